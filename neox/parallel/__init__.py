"""Who this process is among the others, and how a layer is divided between them."""
