"""SAEs in other packages' layouts on disk, written and read without importing those packages.

One module a package (``saelens``, ``overcomplete``, ``dictionary_learning``), each with ``save(sae, folder)`` and
``load(folder)``. None of the packages keeps a normaliser beside its weights, so ``save`` folds ours into them: codes
stay equal and the reconstruction is in raw space. ``load`` gives an SAE whose normaliser is the identity and whose
decoder rows keep the norm they have on disk.

``releases`` only reads: SAEs as vision projects release them, one entry a format. ``pretrained`` lists public ones.
"""
