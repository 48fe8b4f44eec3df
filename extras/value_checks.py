"""
Check the values of settings before anything is written: secrets, paths, numbers.
"""
import os, re, tempfile

from extras.flag_mistakes import DASHES, ConfigError, show

# The largest number of any key: with it even x * y^2, a weight and a squared error, is finite in float32.
LARGEST = 1e12
# The longest name of a file, in bytes, and the longest list of environments.
LONGEST_NAME = 255
LONGEST_LIST = 2000

# What a server's key looks like: a vendor's prefix, or one long word of letters and digits.
SECRET_VALUE = re.compile(r"(sk|pk|rk|gsk|ghp|gho|github_pat|xai|nvapi|glpat)[-_](?=.*[0-9])[\w-]{8,}[^/\s]*"
                          r"|hf_[A-Za-z0-9]{20,}|AIza[\w-]{20,}|Bearer\b.*"
                          r"|(?=.*[0-9])(?=.*[A-Za-z])[A-Za-z0-9]{32,}"
                          r"|.*[?&](api_?key|key|token)=.+", re.I)
# An address with a user and a password in it.
SECRET_ADDRESS = re.compile(r".*://[^/\s]*@.*")
# The address of a server.
ADDRESS = re.compile(r"https?://[^\s/?#@]+(/[^\s?#]*)?")
# Flags of other programs that take the key itself.
SECRET_NAME = re.compile(r"(.*_)?(api_?key|secret|secret_key|password)|key"
                         r"|(hf_|api_|auth_|access_)?token", re.I)
# A name that may be repeated.
SAFE_NAME = re.compile(r"[A-Za-z_]{1,24}")

def check_secrets(argv):
    """Refuse a command line with a key or a password in it, without repeating it.

    The arguments are printed and stored in eval.json and meta.json.
    """
    previous = ""
    for word in argv:
        name, equals, value = word.lstrip(DASHES).partition("=")
        if not equals:
            # `--api_key sk-...`, or a key that stands alone
            name = previous
            value = word
        value = value.strip("'\" \n")
        name = name.replace("-", "_")
        # a folder may be called hf_experiment1
        is_folder = name in ("out_dir", "save") or os.path.exists(value)
        is_secret = SECRET_VALUE.fullmatch(value) and not is_folder
        is_secret = is_secret or SECRET_ADDRESS.fullmatch(value) or (value and SECRET_NAME.fullmatch(name))
        if name == "api_key_env" and not is_secret and value not in ("", "OPENAI_API_KEY", *os.environ):
            raise ConfigError("--api_key_env: the environment variable that it names is not set; the value "
                              "is not repeated here, because it may be the key itself.")
        if is_secret:
            where = f"--{name}" if SAFE_NAME.fullmatch(name) else "A word of the command line"
            raise ConfigError(f"{where}: this looks like a key or a password, and command lines are printed "
                              "and stored: put it into the environment variable OPENAI_API_KEY, or into the "
                              "one that --api_key_env names.")
        previous = "" if equals else word.lstrip(DASHES)

def check_path(key, path):
    """Refuse a path that cannot be meant: with an unprintable character, a name too long, or a ~."""
    if not path.isprintable():
        raise ConfigError(f"{key}={path!r} has a character that cannot be printed: write another path.")
    if path.startswith("~"):
        raise ConfigError(f"{key}={path!r}: a shell replaces ~ only where a word begins: write the path in "
                          "full, or use $HOME.")
    if any(len(name.encode()) > LONGEST_NAME for name in path.split("/")) or len(path) > 4000:
        raise ConfigError(f"{key}={show(path)!r} is too long for a path: write a shorter one.")

def check_address(key, url):
    """Refuse what is no server's address; '' means that there is no server."""
    if SECRET_ADDRESS.fullmatch(url):
        raise ConfigError(f"{key}: a user and a password in an address would be printed and stored: put the "
                          "server's key into the environment variable OPENAI_API_KEY.")
    if url and not ADDRESS.fullmatch(url):
        raise ConfigError(f"{key}={show(url)!r} is no address of a server: write for instance "
                          f"{key}=http://localhost:8000/v1.")

def check_out_dir(path, key="out_dir"):
    """Refuse a path at which no folder can be made or written, before any work is done."""
    if not path.strip():
        raise ConfigError(f"{key}={path!r} names no folder: write for instance {key}=out/run.")
    check_path(key, path)
    existing = os.path.abspath(path)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise ConfigError(f"{key}={path!r}: {existing!r} is no folder, so nothing can be written there: "
                          f"choose another {key}.")
    try:
        # Rights alone do not tell: a disk may be full, or a file system be read-only.
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        raise ConfigError(f"{key}={path!r}: {existing!r} cannot be written ({error.strerror}): choose "
                          f"another {key}.")

def check_tasks(env):
    """Refuse a list of environments that is endless or has an empty place: --env=NumberLine,,EZPoints."""
    if len(env) > LONGEST_LIST:
        raise ConfigError(f"env={show(env)!r} is longer than {LONGEST_LIST} characters: name fewer "
                          "environments.")
    if not all(name.strip() for name in env.split(",")):
        raise ConfigError(f"env={env!r} has a place without a name: write --env=NumberLine, or several with "
                          "one comma between them.")

def check_ranges(cfg, ranges, dashes=""):
    """Check that numbers are in their ranges, and none is larger than what float32 can calculate with.

    dashes: "--" where a key can only be a flag.
    """
    for name, value in vars(cfg).items():
        if isinstance(value, (int, float)) and not abs(value) <= LARGEST:
            raise ConfigError(f"{dashes}{name}={value!r} is out of range: no number may be beyond "
                              f"+-{LARGEST:g}.")
    for names, test, words in ranges:
        for name in names.split():
            value = getattr(cfg, name)
            if not test(value):
                raise ConfigError(f"{dashes}{name}={value!r} is out of range: it must be {words}.")
