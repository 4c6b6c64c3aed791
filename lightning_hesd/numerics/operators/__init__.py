"""Curvature matrices as operators: Hessian-vector products, how they are computed, and what memory they take."""
