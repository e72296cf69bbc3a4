"""The commands, installed as the package ``ucdir_cli``; benchmarks and studies stay in the repository."""
