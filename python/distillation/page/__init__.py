"""One self-contained HTML page of a run folder: ``write_page(folder)``, or ``python -m distillation.page FOLDER``."""

from .page import write_page as write_page
