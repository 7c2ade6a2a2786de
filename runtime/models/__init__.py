"""Model classes of hasten's own, and beside them the folders of the embedded models."""
