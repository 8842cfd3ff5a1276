"""What an engine says with other weights in its model's place."""

from tiered.source import MappedExperts
from tiered.store import ExpertStore
from tiered.weights.loader import WeightLoader


def logits_with(engine, checkpoint, ids):
    """Logits with the layers of `checkpoint`, of the same shapes, which is closed then; the engine
    keeps them, and is of no use afterwards."""
    with checkpoint, ExpertStore(checkpoint, "none") as store:
        loader = WeightLoader(checkpoint, engine.backend, "none")
        engine.decoder.layers = [loader.layer(i, store) for i in range(engine.config.num_layers)]
        engine.decoder.source = MappedExperts(store)
        return engine.logits(ids)
