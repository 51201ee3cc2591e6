"""Vision encoders: the bundled tiny ones and any of timm and transformers, behind one interface."""
