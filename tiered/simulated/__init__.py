"""Parts of a machine that is described and not there: they take time on a virtual clock."""
