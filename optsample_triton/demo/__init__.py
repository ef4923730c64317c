"""`optsample demo`: a small real model as the policy, the same model with a hint as the target, and q* between them.

``model`` fetches and keeps the model, ``questions`` says what is asked, ``texts`` draws with the pipeline and scores
what was drawn, ``terminal`` shows the texts side by side, ``figures`` and ``page`` make an HTML page with pictures.
Needs the extra ``demo``.
"""
