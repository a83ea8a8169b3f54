"""The engine: draws cases, has them judged, shrinks and keeps what disagrees. It yields events and prints nothing."""
