"""
Write the page that shows what an agent does: report.html with everything in it, curves.svg, a GIF per game.

    python evaluate.py out/numberline --report           # a run: its evaluation, its curves
    python evaluate.py out/numberline/data --report      # a folder of episodes

The order below: which episodes, what the critic thinks of their tokens, the page's data, charts, the table of
results, the GIF, and write_report, which puts them together. The page itself is assets/report.html.
"""
import base64, functools, io, json, math, os, re
from html import escape

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import envs
from agent_rl import advantages, clip_reward, filter_weight, pick_token, state_value
from buffer import make_batch, prompt_messages, reply_text
from configurator import is_number
from extras.whole_files import write_whole

ASSETS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "assets")

def read_asset(name):
    """Read a text file of assets/."""
    with open(os.path.join(ASSETS, name), encoding="utf-8") as f:
        return f.read()


# the colours and lines of charts: the page and curves.svg share them
LOOK = "\n" + read_asset("charts.css")


# ---- which episodes ----

def choose_episodes(buf, n, start=0):
    """Choose n of the episodes that begin at row `start` or later.

    They come evenly from the successes and the failures of every game, in the order of the buffer.
    Returns {name of an episode: how many episodes of its kind it stands for}.
    """
    kinds = {}
    for name, turns in buf.episodes.items():
        if turns[0] >= start:
            kinds.setdefault(buf.index.outcome(name), []).append(name)
    chosen = {}
    # the smallest kind first: what it cannot fill of its share is left to the larger ones
    for done, names in enumerate(sorted(kinds.values(), key=len)):
        share = math.ceil((n - len(chosen)) / (len(kinds) - done))
        count = min(len(names), share)
        for k in range(count):
            chosen[names[k * len(names) // count]] = len(names) / count
    return {name: chosen[name] for name in buf.episodes if name in chosen}


# ---- what the critic thinks of their tokens ----

def judge_tokens(vlm, batch, run_cfg, top):
    """Compute what the loss sees of each reply token of a batch -> (alternatives, taken, others).

    alternatives (B, R, top): ids of the likeliest tokens, the one that was taken among them.
    taken (B, R, 5): p, Q, V, A, f of what was taken. others (B, R, top, 2): p, Q of the alternatives.
    Without a critic there is only p: (B, R, 1) and (B, R, top, 1).
    """
    actions = batch["reply_ids"]
    # as in training: beside a bfloat16 base there may be float32 weights
    with vlm.autocast():
        logits, hidden = vlm(batch["inputs"], batch["P"], actions.shape[1])
    logits = logits.float()
    pi = logits.softmax(-1)
    alternatives = pi.topk(top).indices
    is_listed = (alternatives == actions[..., None]).any(-1)
    alternatives[..., -1] = torch.where(is_listed, alternatives[..., -1], actions)

    taken = [pick_token(pi, actions)]
    others = [pi.gather(-1, alternatives)]
    if len(vlm.heads):
        q = vlm.q(hidden)  # (C, B, R, V)
        qa = pick_token(q, actions)
        v = state_value(logits, q.mean(0))
        adv = advantages(qa, v, batch["mask"], run_cfg)
        f = filter_weight(adv, run_cfg.actor_loss, run_cfg.beta)
        taken += [qa.mean(0), v, adv, f]
        others.append(q.mean(0).gather(-1, alternatives))
    return alternatives, torch.stack(taken, -1), torch.stack(others, -1)

def for_json(numbers, n):
    """Round numbers to five digits and append None up to n numbers; nan becomes None, JSON has none."""
    out = [None] * n
    for k, x in enumerate(numbers):
        if math.isfinite(x):
            out[k] = float(f"{x:.5g}")
    return out

@torch.no_grad()
def inspect_replies(buf, rows, vlm, run_cfg, top=10, chunk=8):
    """Compute what the loss sees of recorded replies -> {row: (V of its first state, tokens)}.

    rows: row numbers. A token is [id, p, Q, V, A, f, alternatives]; the alternatives are the `top` likeliest
    tokens, the token itself among them, each [id, p, Q]. What a run without a critic does not know is None.
    """
    vlm.eval()
    replies = {}
    for start in tqdm(range(0, len(rows), chunk), desc="critic", disable=None, leave=False):
        part = rows[start : start + chunk]
        batch = make_batch([(buf, [[row] for row in part])], vlm, envs.MARKER, run_cfg.gamma)
        alternatives, taken, others = (x.tolist() for x in judge_tokens(vlm, batch, run_cfg, top))
        ids = batch["reply_ids"].tolist()
        for k, row in enumerate(part):
            tokens = []
            for j in range(int(batch["mask"][k].sum())):
                pairs = zip(alternatives[k][j], others[k][j])
                listed = [[token, *for_json(numbers, 2)] for token, numbers in pairs]
                tokens.append([ids[k][j], *for_json(taken[k][j], 5), listed])
            v = for_json(taken[k][0], 5)[2]
            replies[row] = (v, tokens)
    return replies


# ---- the page's data ----

def token_text(vlm, token):
    """Decode one token; decoded alone, SentencePiece's tokens lose the blank that they begin with."""
    text = vlm.tokenizer.decode([token], clean_up_tokenization_spaces=False)
    raw = vlm.tokenizer.convert_ids_to_tokens(token) or ""
    if raw[:1] in ("\u2581", "\u0120") and text[:1] != " ":
        return " " + text
    return text

def data_uri(image):
    """Encode a picture for the page, as PNG where that is small, else as WebP; at most 640 x 640 pixels."""
    if max(image.size) > 640:
        image.thumbnail((640, 640))
    for kind, options in (("png", dict(optimize=True)), ("webp", dict(quality=80))):
        file = io.BytesIO()
        image.save(file, kind, **options)
        if file.tell() < 12_000:
            break
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"

def json_size(content):
    """Count the bytes that some content takes on the page, where each < is written as \\u003c."""
    text = json.dumps(content)
    return len(text) + 5 * text.count("<")

class PageStore:
    """The prompts and pictures of a page: each is stored once, and turns refer to it by its number.

    size: bytes of the page so far
    """

    def __init__(self):
        self.texts = {}
        self.files = {}
        self.pictures = []
        self.size = 0

    def text_number(self, text):
        if text not in self.texts:
            self.texts[text] = len(self.texts)
            self.size += json_size(text)
        return self.texts[text]

    def picture_number(self, buf, file):
        if file not in self.files:
            self.files[file] = len(self.pictures)
            self.pictures.append(data_uri(buf.image(file).copy()))
            self.size += len(self.pictures[-1])
        return self.files[file]

def shown_prompt(row):
    """Return a row's prompt as the page shows it: the text alone, or a conversation with its roles."""
    parts = []
    for message in prompt_messages(row):
        texts = [part["text"] for part in message["content"] if part["text"]]
        parts.append((message["role"], "\n".join(texts)))
    if len(parts) == 1:
        return parts[0][1]
    return "\n\n".join(f"{role}: {text}" for role, text in parts)

def turn_data(buf, i, store, replies, run_cfg):
    """Return what the page shows of row i. replies: see inspect_replies, empty if nobody judges."""
    row = buf.rows[i]
    v, tokens = replies.get(i, (None, None))
    return_to_go = None
    if run_cfg:
        return_to_go = round(buf.return_to_go(i, run_cfg.gamma), 4)
    return dict(
        pics=[store.picture_number(buf, file) for file in row["images_file_names"]],
        prompt=store.text_number(shown_prompt(row)),
        reply=reply_text(row),
        tokens=tokens,
        v=v,
        go=return_to_go,
        action=row.get("action"),
        valid=row.get("valid"),
        reward=row.get("reward"),
        source=row.get("source"),
    )

def token_words(vlm, tokens):
    """Decode the tokens of a page and their alternatives -> {id: text}. tokens: see inspect_replies."""
    ids = set()
    for token, *_, alternatives in tokens:
        ids.add(token)
        ids.update(alternative[0] for alternative in alternatives)
    return {token: token_text(vlm, token) for token in sorted(ids)}

def colour_scale(tokens):
    """Return the advantage at which colours are full: few tokens have a larger one."""
    # the fifth entry of a token is A
    sizes = [abs(token[4]) for token in tokens if token[4] is not None]
    return max(float(np.quantile(sizes or [1.0], 0.95)), 1e-3)

def page_data(buf, chosen, vlm=None, run_cfg=None, limit=25e6):
    """Collect what the page's script reads, and the points of the calibration chart -> (dict, points).

    chosen: see choose_episodes. A point is (V, observed return, how many turns it stands for).
    Episodes that would make the page larger than `limit` bytes are left out.
    """
    replies = {}
    if vlm:
        rows = [i for name in chosen for i in buf.episodes[name]]
        replies = inspect_replies(buf, rows, vlm, run_cfg)
    store = PageStore()
    episodes = []
    points = []
    for name, stands_for in chosen.items():
        if store.size > limit:
            break
        turns = [turn_data(buf, i, store, replies, run_cfg) for i in buf.episodes[name]]
        last = buf.rows[buf.episodes[name][-1]]
        episode = dict(
            name=name,
            env=last.get("env", ""),
            reached=last["success"],
            total=round(buf.episode_return(name), 4),
            turns=turns,
        )
        episodes.append(episode)
        store.size += json_size(episode)
        for turn in turns:
            if turn["v"] is not None and turn["tokens"]:
                points.append((turn["v"], turn["go"], stands_for))

    tokens = [token for episode in episodes for turn in episode["turns"] for token in turn["tokens"] or []]
    data = dict(
        episodes=episodes,
        texts=list(store.texts),
        pictures=store.pictures,
        words=token_words(vlm, tokens),
        scale=colour_scale(tokens),
        critic=bool(vlm and len(vlm.heads)),
        kind="",
        beta=0,
        turn=False,
    )
    if run_cfg:
        data |= dict(kind=run_cfg.actor_loss, beta=run_cfg.beta, turn=run_cfg.trace == "turn")
    return data, points


# ---- charts ----

# the plot area, in the units of an SVG of 340 x 240; its top depends on the legend
LEFT = 44
RIGHT = 324
BOTTOM = 204

def round_numbers(low, high, n=4):
    """Return at most n + 1 round numbers between two limits."""
    step = 10.0 ** math.floor(math.log10((high - low) / n))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= n + 1e-9)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]

def limits(values):
    """Return the smallest and the largest value, one apart from both if they are equal."""
    low = min(values)
    high = max(values)
    if low < high:
        return low, high
    return low - 1, high + 1

class Axes:
    """The plot area of a chart: x() and y() turn data into positions.

    xs, ys: all values, or the ends of an axis. log: ys are exponents of 10, and the axis has whole decades.
    square: both axes have one scale.
    """

    def __init__(self, xs, ys, top, log=False, square=False):
        if square:
            xs = ys = [*xs, *ys]
        self.x0, self.x1 = limits(xs)
        low, high = limits(ys)
        margin = 0.04 * (high - low)
        self.y0 = low - margin
        self.y1 = high + margin
        if log:
            self.y0 = math.floor(low)
            self.y1 = math.ceil(high)
        self.top = top
        self.log = log

    def x(self, value):
        return round(LEFT + (RIGHT - LEFT) * (value - self.x0) / (self.x1 - self.x0), 1)

    def y(self, value):
        inside = min(max(value, self.y0), self.y1)
        return round(BOTTOM - (BOTTOM - self.top) * (inside - self.y0) / (self.y1 - self.y0), 1)

def draw_grid(axes, x_label):
    """Yield the grid lines with their numbers, the numbers below the plot, and the label of the x axis."""
    for value in round_numbers(axes.y0, axes.y1):
        number = value
        if axes.log:
            if value != round(value):
                continue
            number = 10**value
        y = axes.y(value)
        yield f'<path class="g" d="M{LEFT} {y}H{RIGHT}"/>'
        yield f'<text x="{LEFT - 5}" y="{y + 3.5}" text-anchor="end">{number:.6g}</text>'
    for value in round_numbers(axes.x0, axes.x1, 5):
        yield f'<text x="{axes.x(value)}" y="{BOTTOM + 14}" text-anchor="middle">{value:.6g}</text>'
    middle = (LEFT + RIGHT) / 2
    yield f'<text x="{middle}" y="{BOTTOM + 29}" text-anchor="middle">{escape(x_label)}</text>'

def draw_series(axes, colour, points):
    """Yield a line through points (x, y), or (x, y, half an interval); with dots if they are few."""
    path = "L".join(f"{axes.x(point[0])} {axes.y(point[1])}" for point in points)
    yield f'<path class="s s{colour}" d="M{path}"/>'
    for x, y, *error in points:
        if error:
            low = axes.y(y - error[0])
            high = axes.y(y + error[0])
            yield f'<path class="s s{colour} w" d="M{axes.x(x)} {low}V{high}"/>'
    if len(points) <= 40:
        for point in points:
            yield f'<circle class="d{colour}" cx="{axes.x(point[0])}" cy="{axes.y(point[1])}" r="2.2"/>'

def draw_legend(labels, n_series):
    """Yield the legend, two entries to a line: lines first, then the entry for dots."""
    for k, text in enumerate(labels):
        x = 8 + 166 * (k % 2)
        y = 30 + 14 * (k // 2)
        sign = f'<path class="s s{k % 4}" d="M{x} {y - 3}h18"/>'
        if k >= n_series:
            sign = f'<path class="dots" d="M{x + 9} {y - 3}h0"/>'
        yield f'{sign}<text x="{x + 23}" y="{y}">{escape(text)}</text>'

def chart(title, series, x_label, x_range=None, online=None, log=False, dots=(), square=False):
    """Draw a small plot -> the inside of an SVG of 340 x 240.

    series: {label: [(x, y) or (x, y, half an interval)]}. x_range: the ends of the x axis. online: the x
    after which the run played itself. log: y is an exponent of 10. dots: more points, [(x, y)]. square: both
    axes have one scale, and the line where they are equal is drawn.
    """
    labels = list(series)
    if dots:
        labels.append("one turn")
    top = 28 + 14 * math.ceil(len(labels) / 2)
    points = [point for line in (*series.values(), dots) for point in line]
    xs = x_range or [point[0] for point in points]
    axes = Axes(xs, [point[1] for point in points], top, log, square)

    out = [f'<text class="t" x="6" y="15">{escape(title)}</text>']
    if online is not None:
        x = axes.x(online)
        out.append(f'<rect class="on" x="{x}" y="{top}" width="{RIGHT - x}" height="{BOTTOM - top}"/>')
    out += draw_grid(axes, x_label)
    if square:
        start = f"{axes.x(axes.x0)} {axes.y(axes.x0)}"
        end = f"{axes.x(axes.x1)} {axes.y(axes.x1)}"
        out.append(f'<path class="g eq" d="M{start}L{end}"/>')
    if dots:
        path = "".join(f"M{axes.x(x)} {axes.y(y)}h0" for x, y in dots)
        out.append(f'<path class="dots" d="{path}"/>')
    for k, line in enumerate(series.values()):
        out += draw_series(axes, k % 4, line)
    out += draw_legend(labels, len(series))
    return "".join(out)


# (title, factor, metrics as a regular expression, whether y is in decades)
CURVES = [
    ("Return of an episode", 1, r"(rollout|eval)/(.*/)?episode_return", False),
    ("Success, %", 100, r"(rollout|eval)/(.*/)?success(_return)?", False),
    ("Valid actions, %", 100, r"(rollout|eval)/(.*/)?valid", False),
    ("Tokens that pass the filter, %", 100, "pass_.*", False),
    ("Losses, in decades", 1, "nll|td_error|pess", True),
    ("Values and returns, discounted", 1, "[qv]_mean|return_.*", False),
]

def curve_series(rows, factor, pattern, log):
    """Collect the metrics whose names match a pattern -> {name: [(step, value)]}; log: their logarithms."""
    series = {}
    for row in rows:
        for name, value in row.items():
            if not re.fullmatch(pattern, name) or not is_number(value) or not math.isfinite(value):
                continue
            if log and value <= 0:
                continue
            y = factor * value
            if log:
                y = math.log10(y)
            series.setdefault(name, []).append((row["step"], y))
    return series

def read_metrics(file):
    """Read the rows of a metrics.jsonl that are whole."""
    rows = []
    with open(file, errors="replace") as f:
        for line in f:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and type(row.get("step")) is int and isinstance(row.get("phase"), str):
                rows.append(row)
    return rows

def learning_curves(run):
    """Draw the charts that a run's metrics.jsonl has numbers for; the online phase is shaded."""
    rows = read_metrics(os.path.join(run, "metrics.jsonl"))
    if not rows:
        return []
    online = None
    x_label = "update, offline"
    if any(row["phase"] == "online" for row in rows):
        online = max([0, *(row["step"] for row in rows if row["phase"] == "offline")])
        x_label = "update (shaded: online)"
    charts = []
    for title, factor, pattern, log in CURVES:
        series = curve_series(rows, factor, pattern, log)
        if series:
            charts.append(chart(title, series, x_label, (0, rows[-1]["step"]), online, log))
    return charts

def calibration_chart(points):
    """Draw observed against predicted returns; see page_data for the points.

    The line shows the mean of each tenth of the predictions with a 95 % interval. A turn has the weight of
    the episodes that it stands for. At most 1,500 turns are drawn as dots.
    """
    predicted, observed, weight = np.array(sorted(points)).T
    n_parts = min(10, math.ceil(len(predicted) / 8))
    means = []
    for part in np.array_split(np.arange(len(predicted)), n_parts):
        w = weight[part]
        x = float((w * predicted[part]).sum() / w.sum())
        y = float((w * observed[part]).sum() / w.sum())
        deviation = float(np.sqrt((w**2 * (observed[part] - y) ** 2).sum()) / w.sum())
        means.append((x, y, 1.96 * deviation))
    every = math.ceil(len(predicted) / 1500)
    return chart(
        "Return, observed (up) against predicted",
        {"mean, 95 % interval": means},
        "V at a reply's first token",
        dots=list(zip(predicted, observed))[::every],
        square=True,
    )

def curves_svg(charts):
    """Arrange charts as one SVG file, three in a row."""
    height = 240 * math.ceil(len(charts) / 3)
    head = '<svg xmlns="http://www.w3.org/2000/svg" class="chart" width="1020"'
    background = '<rect width="100%" height="100%" fill="var(--bg)"/>'
    out = [f'{head} viewBox="0 0 1020 {height}"><style>{LOOK}</style>{background}']
    for k, drawing in enumerate(charts):
        place = f"translate({340 * (k % 3)} {240 * (k // 3)})"
        out.append(f'<g transform="{place}">{drawing}</g>')
    return "".join(out) + "</svg>\n"


# ---- the table of results ----

def rate_cell(summary, key, title):
    """Return a cell with a rate and its interval, and the interval drawn on a line from 0 to 100 %."""
    rate = summary[key]
    low, high = (100 * x for x in summary.get(key + "_95", (rate, rate)))
    bar = f'<rect class="in" x="{min(low, 99):.1f}" width="{max(1, high - low):.1f}" height="3"/>'
    return (
        f'<td class="rate" data-of="{title}, %">{100 * rate:.1f} <small>[{low:.1f}, {high:.1f}]</small>'
        '<svg class="bar" viewBox="0 0 100 3" preserveAspectRatio="none">'
        f'<rect width="100" height="3"/>{bar}</svg></td>'
    )

def summary_row(name, summary, attributes=""):
    """Return the row of one evaluation."""
    return (
        f'<tr{attributes}><th scope="row">{escape(name)}</th>'
        f'{rate_cell(summary, "success", "goal reached")}'
        f'{rate_cell(summary, "success_return", "summed reward &gt; 0")}'
        f'<td data-of="return">{summary["episode_return"]:.3f}</td>'
        f'<td data-of="turns">{summary["turns"]:.2f}</td>'
        f'<td data-of="valid, %">{100 * summary["valid"]:.1f}</td>'
        f'<td data-of="episodes">{summary["episodes"]}</td></tr>'
    )

def tag_row(tag, group):
    """Return the row of the episodes that an environment gives one tag."""
    return (
        f'<tr class="tag"><th scope="row">{escape(tag)}</th>'
        f'<td class="rate" data-of="goal reached, %">{100 * group["success"]:.1f} <small></small></td>'
        f'<td colspan="4"></td><td data-of="episodes">{group["episodes"]}</td></tr>'
    )

def html_table(results):
    """Turn {name: summary} into the rows of the page's table, with a row per game and per tag."""
    out = []
    for name, summary in results.items():
        rows = [(name, summary, "")]
        for game, part in summary.get("by_env", {}).items():
            rows.append((game, part, ' class="tag"'))
        for title, part, attributes in rows:
            out.append(summary_row(title, part, attributes))
            out += [tag_row(tag, group) for tag, group in part.get("by_tag", {}).items()]
    return "".join(out)


# ---- the GIF ----

# pixels: the shorter side of a frame's picture is at least GIF_SIDE, the longer one at most GIF_LIMIT
GIF_SIDE = 240
GIF_LIMIT = 480
# pixels below the picture, for two lines of text
CAPTION = 44
SOFT = (165, 175, 185)

@functools.cache
def load_font(size):
    """Load Pillow's own font at a size in pixels."""
    return ImageFont.load_default(size=size)

def gif_size(image):
    """Return the size of a picture in a GIF: small ones are enlarged by a whole number."""
    shorter = min(image.size)
    longer = max(image.size)
    scale = min(max(1, math.ceil(GIF_SIDE / shorter)), GIF_LIMIT / longer)
    return round(image.width * scale), round(image.height * scale)

def shown_action(row):
    """Return what the agent did in a turn, on one line."""
    reply = reply_text(row)
    text = row["action"]
    if reply is None:
        text = "cut off here"
    elif not row["valid"]:
        text = f"invalid: {reply}"
    return " ".join(text.split())

def draw_frame(image, size, row, status, counter):
    """Draw a turn: its picture, then a line with action and reward, then one with status and counter."""
    width = max(size[0], GIF_SIDE)
    frame = Image.new("RGB", (width, size[1] + CAPTION), (24, 28, 33))
    frame.paste(image.resize(size, Image.LANCZOS), ((width - size[0]) // 2, 0))

    large = load_font(15)
    small = load_font(13)
    action = shown_action(row)
    while len(action) > 1 and large.getlength(action) > width - 110:
        action = action[:-2] + "\u2026"
    action_colour = "white" if row["valid"] else "orange"
    reward = ""
    if reply_text(row) is not None:
        reward = f"reward {row['reward']:+g}"
    reward_colour = "orange" if row["reward"] < 0 else "skyblue"

    draw = ImageDraw.Draw(frame)
    first_line = size[1] + 4
    second_line = size[1] + 24
    draw.text((8, first_line), action, fill=action_colour, font=large, anchor="la")
    draw.text((width - 8, first_line), reward, fill=reward_colour, font=large, anchor="ra")
    draw.text((8, second_line), status, fill=SOFT, font=small, anchor="la")
    draw.text((width - 8, second_line), counter, fill=SOFT, font=small, anchor="ra")
    return frame

def write_gif(buf, episodes, file):
    """Write episodes as one moving picture: 0.8 s per turn, 2 s for the last one of an episode."""
    frames = []
    durations = []
    size = None
    for number, name in enumerate(episodes, 1):
        turns = buf.episodes[name]
        for turn, i in enumerate(turns, 1):
            row = buf.rows[i]
            image = buf.image(row["images_file_names"][-1])
            # all frames have the size of the first
            size = size or gif_size(image)
            is_last = turn == len(turns)
            status = f"turn {turn}"
            if is_last:
                outcome = "reached" if row["success"] else "missed"
                status = f"{outcome} the goal, return {buf.episode_return(name):g}"
            frame = draw_frame(image, size, row, status, f"{number}/{len(episodes)}")
            frames.append(frame.quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE))
            durations.append(2000 if is_last else 800)
    # a link that came with a downloaded run is not followed
    if os.path.lexists(file):
        os.remove(file)
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True)

def write_game_gif(buf, chosen, game, folder):
    """Write the GIF of a game: at most six of the chosen episodes, from long to short -> its path."""
    names = [name for name in chosen if buf.rows[buf.episodes[name][0]].get("env", "") == game]
    names.sort(key=lambda name: -len(buf.episodes[name]))
    every = math.ceil(len(names) / 6)
    file = os.path.join(folder, re.sub(r"\W+", "_", game or "episodes") + ".gif")
    write_gif(buf, names[::every], file)
    return file


# ---- the page ----

def judge_note(vlm, run, run_cfg):
    """Say who judged the tokens."""
    if not vlm:
        return (
            "There is no trained run behind these episodes, so their tokens are not coloured: "
            "--critic=out/x names one."
        )
    if len(vlm.heads):
        return f"Tokens are judged by the critic of {run}."
    kind = f"actor_loss = {run_cfg.actor_loss!r}"
    return f"{run} trained no critic ({kind}), so a token shows its probability alone."

def count_note(n, n_chosen, total):
    """Say how many of all episodes are on the page, and why not more of those that were chosen."""
    if n == total:
        return f"All {total} episodes are shown."
    kinds = "evenly of those that reached the goal and those that did not"
    count = f"{n} of {total} episodes are shown, {kinds}"
    if n < n_chosen:
        return f"{count}; more would make the page too large to open fast."
    return f"{count}."

def fill_page(parts):
    """Put the parts into assets/report.html, in one pass: what is inserted is not searched again."""
    return re.sub(r"@([A-Z]+)@", lambda match: parts[match[1]], read_asset("report.html"))

def page_charts(charts, points):
    """Return the heading, the drawings and the remark of the page's charts, as parts of the page."""
    head = "What the critic predicts"
    if charts:
        head = "How it learned"
    remark = ""
    if len(points) > 1:
        charts = [*charts, calibration_chart(points)]
        remark = (
            "A point on the dashed line was predicted exactly. The critic predicts what the policy gets from "
            "here on; what others played may well have got less."
        )
    drawings = [f'<svg class="chart" viewBox="0 0 340 240">{drawing}</svg>' for drawing in charts]
    return dict(HEAD=head, CHARTS="".join(drawings), LINE=remark)

def write_report(folder, buf, results, vlm=None, run=None, run_cfg=None, n=100, start=0):
    """Write folder/report.html about n of the episodes that begin at row `start` or later.

    results: {name: summary}, the table. vlm, run, run_cfg: the run whose critic judges them, if there is one.
    A run's own folder also gets curves.svg and a GIF per game. A folder of data does not: a picture in there
    would be data.
    """
    if run_cfg:
        buf.reward_fn = lambda reward: clip_reward(reward, run_cfg)
    chosen = choose_episodes(buf, n, start)
    total = sum(turns[0] >= start for turns in buf.episodes.values())
    data, points = page_data(buf, chosen, vlm, run_cfg)
    games = list(dict.fromkeys(episode["env"] for episode in data["episodes"]))
    count = count_note(len(data["episodes"]), len(chosen), total)

    written = [os.path.join(folder, "report.html")]
    charts = []
    if run == folder:
        if os.path.exists(os.path.join(run, "metrics.jsonl")):
            charts = learning_curves(run)
        if charts:
            written.append(os.path.join(folder, "curves.svg"))
            write_whole(written[-1], curves_svg(charts))
        written += [write_game_gif(buf, chosen, game, folder) for game in games]

    # pure ASCII, and no reply can end the script
    content = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = dict(
        LOOK=LOOK,
        TITLE=escape(", ".join(games) or "Episodes"),
        FOLDER=escape(folder),
        NOTE=escape(f"{judge_note(vlm, run, run_cfg)} {count}"),
        ROWS=html_table(results),
        DATA=content,
    )
    page = fill_page(parts | page_charts(charts, points))
    write_whole(written[0], page)
    megabytes = len(page) / 1e6
    print(f"report   {', '.join(written)}: {megabytes:.1f} MB, {len(data['episodes'])} of {total} episodes")
