"""A page of this machine to look at pairs and decide about them."""
