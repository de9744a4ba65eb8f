"""``ensdef report``: a results folder as one HTML page that needs nothing else. A function of files; no torch.

``gathering`` reads the folder, ``standings`` ranks models, ``board`` lays them out, ``drawers`` tells a record to its
reader; ``curves``, ``transfer``, ``breakdown``, ``tradeoffs`` and ``replication`` say what is drawn; ``page`` puts it
into ``template.html``, with ``style.css``, ``script.js`` and the charting library of ``library``.
"""

from ensdef.report.page import render

__all__ = ["render"]
