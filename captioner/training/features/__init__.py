"""Features of labelled images by the vision tower: computed once, cached, and read by every epoch."""
