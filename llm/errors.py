"""The one exception type for mistakes a user can make and mend."""


class UserError(ValueError):
    """A wrong config value, file or combination. The text names the key or file, the value and the fix.

    Entry points print it as one `error: ...` line without a traceback and exit with status 2.
    """


class NonFiniteLoss(UserError):
    """A training step whose loss is not a number, raised before the update: the weights are those of the step before.

    step: the one that failed, counted from 1. documents: ids (B, T) of the micro-batch that did it.
    """

    def __init__(self, step: int, loss: float, micro: int, documents):
        super().__init__(
            f"the training loss became {loss} in step {step}, micro-batch {micro}: lower the learning rate "
            "(stage.lr_frac) and start again with overwrite=true or run=<new name>"
        )
        self.step, self.documents = step, documents
