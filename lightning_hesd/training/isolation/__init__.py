"""The isolation of training from an analysis: all objects around the module are restored, and logging is silenced."""
