"""The thin Ray shell around the pure controller and the engine: the only code of the project that imports Ray."""
