"""All layers, losses and functions of PyTorch: are their Hessians right?"""
