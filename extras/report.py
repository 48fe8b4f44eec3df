"""
The page that shows what an agent does: one HTML file with everything in it, curves.svg, a GIF a game. `python evaluate.py out/numberline --report` writes them.
"""
import base64, io, json, math, os, re
from html import escape

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import envs
from agent_rl import AWR_TEMPERATURE, advantages, clip_reward, filter_weight, state_value
from buffer import make_batch, reply_text


def choose(buf, n, start=0):
    """n episodes of those from row `start` on, evenly from every game's reached and missed ones -> {episode: how many of its kind it stands for}."""
    kinds, chosen = {}, {}
    for name, turns in buf.episodes.items():
        if turns[0] >= start:
            kinds.setdefault((buf.rows[turns[0]].get("env", ""), buf.rows[turns[-1]]["success"]), []).append(name)
    for left, kind in zip(range(len(kinds), 0, -1), sorted(kinds.values(), key=len)):   # a small kind leaves its share to the larger ones
        m = min(len(kind), -(-(n - len(chosen)) // left))
        chosen |= {kind[k * len(kind) // m]: len(kind) / m for k in range(m)}
    return {name: chosen[name] for name in buf.episodes if name in chosen}


@torch.no_grad()
def inspect(buf, rows, vlm, run_cfg, top=10, chunk=8):
    """What the loss sees of recorded replies. rows: row numbers -> {row: (V of its first state, tokens)}; a token is [id, p, Q, V, A, f, alternatives], the
    `top` likeliest alternatives are [id, p, Q], the token itself among them. Without a critic only p is known, the others are None."""
    seen, vlm = {}, vlm.eval()
    short = lambda x: float(f"{x:.5g}") if math.isfinite(x) else None                    # JSON has no nan
    for i in tqdm(range(0, len(rows), chunk), desc="critic", disable=None, leave=False):
        b = make_batch([(buf, [[row] for row in rows[i:i + chunk]])], vlm, envs.MARKER, run_cfg.gamma)
        a, mask = b["reply_ids"], b["mask"]
        logits, hidden = vlm(b["inputs"], b["P"], a.shape[1])
        pi = logits.softmax(-1)
        likely = pi.topk(top).indices                                                    # (B, R, top)
        likely[..., -1] = torch.where((likely == a[..., None]).any(-1), likely[..., -1], a)
        said, other = [pi.gather(-1, a[..., None])[..., 0]], [pi.gather(-1, likely)]
        if len(vlm.heads):
            q = vlm.q(hidden)
            qa, v = q.gather(-1, a.expand(len(q), *a.shape)[..., None])[..., 0], state_value(logits, q.mean(0))
            adv = advantages(qa, v, mask, run_cfg)
            said += [qa.mean(0), v, adv, filter_weight(adv, run_cfg.actor_loss, run_cfg.beta, AWR_TEMPERATURE)]
            other += [q.mean(0).gather(-1, likely)]
        said, other = torch.stack(said, -1).tolist(), torch.stack(other, -1).tolist()
        full = lambda x, n: [*map(short, x), *[None] * (n - len(x))]
        for k, row in enumerate(rows[i:i + chunk]):
            tokens = [[int(a[k, j]), *full(said[k][j], 5), [[int(w), *full(x, 2)] for w, x in zip(likely[k, j], other[k][j])]] for j in range(int(mask[k].sum()))]
            seen[row] = full(said[k][0], 5)[2], tokens
    return seen


def word(vlm, i):
    """One token as text. Decoded alone, SentencePiece's tokens lose the blank they begin with."""
    text, raw = vlm.tokenizer.decode([i], clean_up_tokenization_spaces=False), vlm.tokenizer.convert_ids_to_tokens(i) or ""
    return " " + text if raw[:1] in ("\u2581", "\u0120") and text[:1] != " " else text


def data_uri(image):
    """A picture as the page holds it: PNG where that is small, else WebP; at most 640 pixels wide or high."""
    image.thumbnail((640, 640)) if max(image.size) > 640 else None
    for kind, options in (("png", dict(optimize=True)), ("webp", dict(quality=80))):
        image.save(file := io.BytesIO(), kind, **options)
        if file.tell() < 12_000:
            break
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def page_data(buf, chosen, vlm=None, run_cfg=None, limit=25e6):
    """Episodes -> (what the page's script reads, points of the calibration plot: (V, observed return, how many turns it stands for)).
    Texts and pictures stand there once, and are named by number. Episodes that would take it over `limit` bytes are left out."""
    seen = inspect(buf, [i for e in chosen for i in buf.episodes[e]], vlm, run_cfg) if vlm else {}
    weight = lambda x: len(text := json.dumps(x)) + 5 * text.count("<")                  # as it will be escaped
    texts, places, pictures, words, size, out, points = {}, {}, [], set(), 0, [], []
    for name, stands_for in chosen.items():
        if size > limit:
            break
        turns = []
        for i in buf.episodes[name]:
            row, (v, tokens) = buf.rows[i], seen.get(i, (None, None))
            asked = [(m["role"], "\n".join(p["text"] for p in m["content"] if p["text"])) for m in row["messages"][:len(row["messages"]) - (reply_text(row) is not None)]]
            prompt = asked[0][1] if len(asked) == 1 else "\n\n".join(f"{role}: {text}" for role, text in asked)
            for file in row["images_file_names"]:
                if file not in places:
                    places[file] = len(pictures)
                    pictures.append(data_uri(buf.image(file).copy()))
                    size += len(pictures[-1])
            size += weight(prompt) if prompt not in texts else 0
            words |= {w for t in tokens or [] for w in [t[0], *(x[0] for x in t[-1])]}
            turns.append(dict(pics=[places[file] for file in row["images_file_names"]], prompt=texts.setdefault(prompt, len(texts)), reply=reply_text(row), tokens=tokens, v=v,
                              go=round(buf.return_to_go(i, run_cfg.gamma), 4) if run_cfg else None, **{k: row.get(k) for k in ("action", "valid", "reward", "source")}))
            if v is not None and tokens:
                points.append((v, turns[-1]["go"], stands_for))
        last = buf.rows[buf.episodes[name][-1]]
        out.append(dict(name=name, env=last.get("env", ""), reached=last["success"], total=round(buf.episode_return(name), 4), turns=turns))
        size += weight(out[-1])
    scale = np.quantile([abs(t[4]) for e in out for x in e["turns"] for t in x["tokens"] or [] if t[4] is not None] or [1.0], 0.95)
    return dict(episodes=out, texts=list(texts), pictures=pictures, words={w: word(vlm, w) for w in sorted(words)}, scale=max(float(scale), 1e-3),
                critic=bool(vlm and len(vlm.heads)), kind=run_cfg.actor_loss if run_cfg else "", beta=run_cfg.beta if run_cfg else 0, turn=bool(run_cfg and run_cfg.mdp == "turn")), points


def nice(lo, hi, n=4):
    """At most n + 1 round numbers between lo and hi."""
    step = 10.0 ** math.floor(math.log10((hi - lo) / n))
    step *= next(k for k in (1, 2, 5, 10) if (hi - lo) / (step * k) <= n + 1e-9)
    return [k * step for k in range(math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9) + 1)]


def chart(title, series, x_label, x_range=None, online=None, log=False, dots=(), square=False):
    """A small plot -> the inside of an SVG of 340 x 240. series: {label: [(x, y) or (x, y, half an interval)]}; x_range: ends of the axis; online: the x after which the
    run played itself; log: y in decades; dots: more points, [(x, y)]; square: both axes have one scale, and the line where they are equal is drawn."""
    series = {label: [(x, math.log10(y) if log else y, *e) for x, y, *e in points] for label, points in series.items()}
    every = [p for points in (*series.values(), dots) for p in points]
    xs, ys = x_range or [p[0] for p in every], [p[1] for p in every]
    limits = lambda v: (min(v), max(v)) if min(v) < max(v) else (min(v) - 1, max(v) + 1)
    (x0, x1), (y0, y1) = (limits([*xs, *ys]),) * 2 if square else (limits(xs), limits(ys))
    y0, y1 = (math.floor(y0), math.ceil(y1)) if log else (y0 - 0.04 * (y1 - y0), y1 + 0.04 * (y1 - y0))
    legend = list(series) + ["one turn"] * bool(dots)
    left, right, top, bottom = 44, 324, 28 + 14 * -(-len(legend) // 2), 204
    X, Y = lambda x: round(left + (right - left) * (x - x0) / (x1 - x0), 1), lambda y: round(bottom - (bottom - top) * (min(max(y, y0), y1) - y0) / (y1 - y0), 1)
    out = [f'<text class="t" x="6" y="15">{escape(title)}</text>']
    if online is not None:
        out.append(f'<rect class="on" x="{X(online)}" y="{top}" width="{right - X(online)}" height="{bottom - top}"/>')
    for y in nice(y0, y1):
        if not log or y == round(y):
            out.append(f'<path class="g" d="M{left} {Y(y)}H{right}"/><text x="{left - 5}" y="{Y(y) + 3.5}" text-anchor="end">{10 ** y if log else y:.6g}</text>')
    out += [f'<text x="{X(x)}" y="{bottom + 14}" text-anchor="middle">{x:.6g}</text>' for x in nice(x0, x1, 5)] + [f'<text x="{(left + right) / 2}" y="{bottom + 29}" text-anchor="middle">{escape(x_label)}</text>']
    if square:
        out.append(f'<path class="g eq" d="M{X(x0)} {Y(x0)}L{X(x1)} {Y(x1)}"/>')
    if dots:
        out.append('<path class="dots" d="' + "".join(f"M{X(x)} {Y(y)}h0" for x, y in dots) + '"/>')
    for k, (label, points) in enumerate(series.items()):
        out.append(f'<path class="s s{k % 4}" d="M' + "L".join(f"{X(p[0])} {Y(p[1])}" for p in points) + '"/>')
        out += [f'<path class="s s{k % 4} w" d="M{X(x)} {Y(y - e[0])}V{Y(y + e[0])}"/>' for x, y, *e in points if e]
        out += [f'<circle class="d{k % 4}" cx="{X(p[0])}" cy="{Y(p[1])}" r="2.2"/>' for p in points] if len(points) <= 40 else []
    for k, label in enumerate(legend):
        x, y = 8 + 166 * (k % 2), 30 + 14 * (k // 2)
        out.append((f'<path class="s s{k % 4}" d="M{x} {y - 3}h18"/>' if k < len(series) else f'<path class="dots" d="M{x + 9} {y - 3}h0"/>') + f'<text x="{x + 23}" y="{y}">{escape(label)}</text>')
    return "".join(out)


# what the page and curves.svg share; the page itself is assets/report.html
LOOK = """
:root { --bg: #fff; --ink: #1a1f25; --soft: #59636e; --line: #d8dde3; --card: #f5f7f9; --good: #0072b2; --bad: #b34d00; --hot: #0072b2; --cold: #d55e00; --c2: #00805c; --c3: #b0468a; color-scheme: light dark }
@media (prefers-color-scheme: dark) { :root { --bg: #14181c; --ink: #e6e9ec; --soft: #9aa5b0; --line: #323a42; --card: #1c2228; --good: #56b4e9; --bad: #f09a3e; --hot: #2272a8; --cold: #b0621a; --c2: #35c79a; --c3: #e391c4 } }
.chart text { font: 11px system-ui, sans-serif; fill: var(--soft) }  .chart .t { font-weight: 600; font-size: 13px; fill: var(--ink) }
.chart .g { stroke: var(--line) }  .chart .eq { stroke: var(--soft); stroke-dasharray: 3 3 }  .chart .on { fill: var(--good); opacity: .09 }
.chart .s { fill: none; stroke-width: 1.8; stroke-linejoin: round }  .chart .w { stroke-width: 1; stroke-dasharray: none }
.chart .dots { stroke: var(--soft); stroke-width: 4; stroke-linecap: round; opacity: .45 }
.s0 { stroke: var(--good) }  .s1 { stroke: var(--bad); stroke-dasharray: 6 2 }  .s2 { stroke: var(--c2); stroke-dasharray: 2 2 }  .s3 { stroke: var(--c3); stroke-dasharray: 8 2 2 2 }
.d0 { fill: var(--good) }  .d1 { fill: var(--bad) }  .d2 { fill: var(--c2) }  .d3 { fill: var(--c3) }
"""

CURVES = (("Return of an episode", 1, r"(rollout|eval)/(.*/)?episode_return"), ("Success, %", 100, r"(rollout|eval)/(.*/)?success(_return)?"), ("Valid actions, %", 100, r"(rollout|eval)/(.*/)?valid"),
          ("Tokens that pass the filter, %", 100, "pass_.*"), ("Losses, in decades", 1, "nll|td_error|pess"), ("Values and returns, discounted", 1, "[qv]_mean|return_.*"))


def learning_curves(run):
    """The charts of a run's metrics.jsonl, those that it has numbers for; the online phase is shaded."""
    with open(os.path.join(run, "metrics.jsonl")) as f:
        rows = [json.loads(line) for line in f if line.endswith("\n")]
    online = max([0, *(r["step"] for r in rows if r["phase"] == "offline")]) if any(r["phase"] == "online" for r in rows) else None
    charts, x_label = [], "update, offline" if online is None else "update (shaded: online)"
    for title, scale, keys in CURVES:
        log, series = "decades" in title, {}
        for r in rows:
            for k, y in r.items():
                if re.fullmatch(keys, k) and math.isfinite(y) and (y > 0 or not log):
                    series.setdefault(k, []).append((r["step"], scale * y))
        charts += [chart(title, series, x_label, (0, rows[-1]["step"]), online, log)] if series else []
    return charts


def calibration(points):
    """The chart of predicted against observed returns, and the mean of each tenth of the predictions with a 95 % interval, weighted by what a turn stands for."""
    v, go, w = np.array(sorted(points)).T
    parts = np.array_split(np.arange(len(v)), min(10, -(-len(v) // 8)))
    mean = lambda x, i: float((w[i] * x[i]).sum() / w[i].sum())
    means = [(mean(v, i), m := mean(go, i), 1.96 * float(np.sqrt((w[i] ** 2 * (go[i] - m) ** 2).sum()) / w[i].sum())) for i in parts]
    return chart("Return, observed (up) against predicted", {"mean, 95 % interval": means}, "V at a reply's first token", dots=list(zip(v, go))[::-(-len(v) // 1500)], square=True)


def html_table(results):
    """{name: summary} -> the rows of the page's table; under a rate a line from 0 to 100 % with its interval."""
    out = []
    for name, s, cls in ((n, x, c) for name, of in results.items() for n, x, c in ((name, of, ""), *((env, x, ' class="tag"') for env, x in of.get("by_env", {}).items()))):
        cells = []
        for key, of in (("success", "goal reached"), ("success_return", "summed reward &gt; 0")):
            lo, hi = (100 * x for x in s.get(key + "_95", (s[key], s[key])))
            cells.append(f'<td class="rate" data-of="{of}, %">{100 * s[key]:.1f} <small>[{lo:.1f}, {hi:.1f}]</small><svg class="bar" viewBox="0 0 100 3" preserveAspectRatio="none">'
                         f'<rect width="100" height="3"/><rect class="in" x="{min(lo, 99):.1f}" width="{max(1, hi - lo):.1f}" height="3"/></svg></td>')
        out.append(f'<tr{cls}><th scope="row">{escape(name)}</th>{"".join(cells)}<td data-of="return">{s["episode_return"]:.3f}</td><td data-of="turns">{s["turns"]:.2f}</td>'
                   f'<td data-of="valid, %">{100 * s["valid"]:.1f}</td><td data-of="episodes">{s["episodes"]}</td></tr>')
        out += [f'<tr class="tag"><th scope="row">{escape(tag)}</th><td class="rate" data-of="goal reached, %">{100 * g["success"]:.1f} <small></small></td>'
                f'<td colspan="4"></td><td data-of="episodes">{g["episodes"]}</td></tr>' for tag, g in s.get("by_tag", {}).items()]
    return "".join(out)


def gif(buf, episodes, file, side=240):
    """Episodes as one moving picture: each turn's picture with what was done under it, 0.8 s a turn, an episode's last one 2 s."""
    frames, fonts, soft = [], [ImageFont.load_default(size=x) for x in (15, 13)], (165, 175, 185)
    w, h = buf.image(buf.rows[buf.episodes[episodes[0]][0]]["images_file_names"][-1]).size
    scale = min(max(1, -(-side // min(w, h))), 480 / max(w, h))
    w, h = round(w * scale), round(h * scale)
    wide = max(w, side)
    for n, name in enumerate(episodes, 1):
        for t, i in enumerate(buf.episodes[name], 1):
            row, end = buf.rows[i], i == buf.episodes[name][-1]
            frame, said = Image.new("RGB", (wide, h + 44), (24, 28, 33)), reply_text(row)
            frame.paste(buf.image(row["images_file_names"][-1]).resize((w, h), Image.LANCZOS), ((wide - w) // 2, 0))
            did = " ".join(("cut off here" if said is None else row["action"] if row["valid"] else f"invalid: {said}").split())
            while len(did) > 1 and fonts[0].getlength(did) > wide - 110:
                did = did[:-2] + "\u2026"
            outcome = f"{'reached' if row['success'] else 'missed'} the goal, return {buf.episode_return(name):g}" if end else f"turn {t}"
            for x, y, text, font, fill in ((8, 4, did, 0, "white" if row["valid"] else "orange"), (wide - 8, 4, f"reward {row['reward']:+g}" if said is not None else "", 0, "orange" if row["reward"] < 0 else "skyblue"),
                                           (8, 24, outcome, 1, soft), (wide - 8, 24, f"{n}/{len(episodes)}", 1, soft)):
                ImageDraw.Draw(frame).text((x, h + y), text, fill=fill, font=fonts[font], anchor="la" if x == 8 else "ra")
            frames.append((frame.quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE), 2000 if end else 800))
    frames[0][0].save(file, save_all=True, append_images=[f for f, _ in frames[1:]], duration=[ms for _, ms in frames], loop=0, optimize=True)


def write_report(folder, buf, results, vlm=None, run=None, run_cfg=None, n=100, start=0):
    """Write folder/report.html about n of the episodes from row `start` on, judged by the VLM of a run if there is one. A run's own folder also gets
    curves.svg and <game>.gif; a folder of data does not, a picture in there would be data."""
    if run_cfg:
        buf.shape = lambda reward: clip_reward(reward, run_cfg)
    chosen, total = choose(buf, n, start), sum(turns[0] >= start for turns in buf.episodes.values())
    data, points = page_data(buf, chosen, vlm, run_cfg)
    own, games, written = run == folder, list(dict.fromkeys(e["env"] for e in data["episodes"])), []
    charts = learning_curves(run) if own and os.path.exists(os.path.join(run, "metrics.jsonl")) else []
    if charts:
        written.append(os.path.join(folder, "curves.svg"))
        with open(written[-1], "w") as f:
            f.write(f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" width="1020" viewBox="0 0 1020 {240 * -(-len(charts) // 3)}"><style>{LOOK}</style><rect width="100%" height="100%" fill="var(--bg)"/>'
                    + "".join(f'<g transform="translate({340 * (k % 3)} {240 * (k // 3)})">{c}</g>' for k, c in enumerate(charts)) + "</svg>\n")
    for game in games if own else ():
        names = sorted((e for e in chosen if buf.rows[buf.episodes[e][0]].get("env", "") == game), key=lambda e: -len(buf.episodes[e]))   # from long to short
        written.append(os.path.join(folder, re.sub(r"\W+", "_", game or "episodes") + ".gif"))
        gif(buf, names[::-(-len(names) // 6)], written[-1])
    judge = "There is no trained run behind these episodes, so their tokens are not coloured: --critic=out/x names one." if not vlm else \
        f"Tokens are judged by the critic of {run}." if data["critic"] else f"{run} trained no critic (actor_loss = {run_cfg.actor_loss!r}), so a token shows its probability alone."
    count = f"All {total} episodes are shown." if len(data["episodes"]) == total else f"{len(data['episodes'])} of {total} episodes are shown, evenly of those that reached the goal and those that did not"
    count += ("; more would make the page too large to open fast." if len(data["episodes"]) < len(chosen) else "." if len(chosen) < total else "")
    head = "How it learned" if charts else "What the critic predicts"
    line = "A point on the dashed line was predicted exactly. The critic predicts what the policy gets from here on; what others played may well have got less." if len(points) > 1 else ""
    parts = dict(LOOK=LOOK, HEAD=head, LINE=line, TITLE=escape(", ".join(games) or "Episodes"), FOLDER=escape(folder), NOTE=escape(f"{judge} {count}"), ROWS=html_table(results),
                 CHARTS="".join(f'<svg class="chart" viewBox="0 0 340 240">{c}</svg>' for c in charts + ([calibration(points)] if len(points) > 1 else [])),
                 DATA=json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))     # pure ASCII, and no reply can end the script
    with open(os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "assets", "report.html"), encoding="utf-8") as f:
        page = re.sub(r"@([A-Z]+)@", lambda m: parts[m[1]], f.read())                    # in one pass: what is put in is not searched again
    written.insert(0, os.path.join(folder, "report.html"))
    with open(written[0], "w") as f:
        f.write(page)
    print(f"report   {', '.join(written)}: {len(page) / 1e6:.1f} MB, {len(data['episodes'])} of {total} episodes")
