"""Hypothesis strategies that draw ``Case``s: few choices each, valid by construction, shrinking to readable cases."""

from nsa_verify.strategies.cases import cases
from nsa_verify.strategies.lengths import boundaries, lengths
from nsa_verify.strategies.limits import Limits
from nsa_verify.strategies.profiles import PROFILES, Profile, profile
from nsa_verify.strategies.replays import replays
from nsa_verify.strategies.requests import requests
from nsa_verify.strategies.setups import setups
from nsa_verify.strategies.swarm import Feature, Swarm

__all__ = [
    "PROFILES",
    "Feature",
    "Limits",
    "Profile",
    "Swarm",
    "boundaries",
    "cases",
    "lengths",
    "profile",
    "replays",
    "requests",
    "setups",
]
