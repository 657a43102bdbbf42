"""What every test shares: hypothesis without deadlines, for these machines are noisy."""

from hypothesis import settings

settings.register_profile("shared-machines", deadline=None)
settings.load_profile("shared-machines")
