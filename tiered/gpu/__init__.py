"""The tier above RAM: experts in the memory of a GPU."""
