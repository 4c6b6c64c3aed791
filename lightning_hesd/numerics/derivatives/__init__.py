"""Operations of PyTorch whose second derivatives are wrong, slow or absent, and what replaces them."""
