"""Distillation: a layer's experts replaced by fewer of them, or by one dense feed-forward, trained
to say the same. Needs torch; nothing that runs a model imports this."""
