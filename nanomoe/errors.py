"""The base of the errors that a job can fail with.

    NanomoeError
    ├── CheckpointDamaged    checkpoint_damaged    nanomoe.checkpoint
    ├── DeviceUnavailable    device_unavailable    nanomoe.training.execution
    ├── LossNotFinite        loss_not_finite       nanomoe.training.loop
    ├── NotExportable        not_exportable        nanomoe.export
    ├── NotImportable        not_a_checkpoint      nanomoe.importing
    ├── OutOfMemory          out_of_memory         nanomoe.plan
    ├── ParentUnusable       parent_unusable       nanomoe.lineage
    ├── TextTooShort         text_too_short        nanomoe.plan
    └── TokenizerError       tokenizer_...         nanomoe.tokenizer

Each comes again whoever tries: it follows from the config, the text, the files or the machine. A trainer fails a job
for good on these alone. Any other exception is a bug or a broken machine, and the attempt counts as a crash.
"""


class NanomoeError(Exception):
    """An error that follows from what a job is, with a code that callers can rely on."""

    code: str
    """Stable, machine-readable name of the error."""
