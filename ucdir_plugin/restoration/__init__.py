"""Restoring images: trained networks and BIR-D behind one interface, for one image or a folder of them."""
