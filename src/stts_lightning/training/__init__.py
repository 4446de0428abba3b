"""The LightningModule and what a training run needs besides: optimiser, schedules, callbacks, loggers."""
