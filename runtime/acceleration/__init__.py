"""Language models made faster in place: techniques, their installation, measuring and saving."""
