"""Facts about models and runs: cost, results on disk. No Lightning here."""
