"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# A busy machine makes any example slow; what a test may take is its timeout. A failure elsewhere can be repeated here.
settings.register_profile("elastictrain", deadline=None, print_blob=True)
settings.load_profile("elastictrain")
