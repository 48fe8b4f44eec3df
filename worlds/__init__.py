"""The environments beside NumberLine, their players and their drawing."""
