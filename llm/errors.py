"""The one exception type for mistakes a user can make and mend."""


class UserError(ValueError):
    """A wrong config value, file or combination. The text names the key or file, the value and the fix.

    Entry points print it as one `error: ...` line without a traceback and exit with status 2.
    """


class NonFiniteLoss(UserError):
    """A training step whose loss is not a number, raised before the update: the weights are those of the step before.

    step: the one that failed, counted from 1. micro, documents: number and ids (B, T) of the micro-batch that did it,
    None where it was another process's.
    """

    def __init__(self, step: int, loss: float, micro: int | None, documents):
        where = "on another process" if micro is None else f"micro-batch {micro}"
        super().__init__(
            f"the training loss became {loss} in step {step}, {where}: lower the learning rate "
            "(stage.lr_frac) and start again with overwrite=true or run=<new name>"
        )
        self.step, self.documents = step, documents
