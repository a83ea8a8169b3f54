"""Reports of a run or a campaign, each made of the same events: ``--report KIND[=PATH]``."""
