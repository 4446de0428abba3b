"""Facts about models and runs: cost, results on disk. No Lightning here."""

import logging

# It tells of each first start that it looks for fonts.
logging.getLogger("matplotlib.font_manager").setLevel(logging.WARNING)
