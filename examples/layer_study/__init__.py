"""A study after Bolshim & Kugaevskikh (2025, arXiv:2510.17486), on networks of many sizes: see `__main__`."""
