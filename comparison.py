"""
Answers of several models to the same questions -> numbers with intervals, tables, and the questions to look at.

A number is what a benchmark's rule makes of the rows (benchmarks.py). Its interval is a 95 % bootstrap over pictures,
or over units where a unit has several: rows about one picture are not independent. Two models are compared on the same
resamples, so that what is hard for both does not blur their difference.
"""
from collections import defaultdict

import numpy as np
from tqdm import tqdm

import common
import gallery
from metrics import score

# ---- numbers ---------------------------------------------------------------------------------------------------------


def cluster_sums(benchmark, lines, values):
    """Rows and how right each is -> parts, wholes, both (clusters, strata).

    The score is the mean over strata of parts.sum(0) / wholes.sum(0): for plain accuracy there is one stratum, parts
    are right answers and wholes are rows. A bootstrap draws clusters: pictures, or the benchmark's units (a rotated
    question, a pair), which may have several pictures."""
    units, cells = defaultdict(list), defaultdict(lambda: [0.0, 0.0])
    for line, value in zip(lines, values):
        if line["stratum"] is not None:
            units[line["unit"]].append((line, value))
    rule = benchmark.rule or (lambda right, rows: (sum(right), len(right)))
    for unit, members in units.items():
        rows, right = zip(*members)
        cell = cells[unit if benchmark.unit else rows[0]["shared"], rows[0]["stratum"]]
        for k, more in enumerate(rule(right, rows)):
            cell[k] += more
    clusters, strata = ({name: i for i, name in enumerate(dict.fromkeys(key[k] for key in cells))} for k in (0, 1))
    parts, wholes = np.zeros((2, len(clusters), len(strata)))
    for (cluster, stratum), (part, whole) in cells.items():
        parts[clusters[cluster], strata[stratum]], wholes[clusters[cluster], strata[stratum]] = part, whole
    return parts, wholes


def score_of(parts, wholes, clusters=slice(None)):
    """The score of some clusters, all by default"""
    part, whole = parts[clusters].sum(0), wholes[clusters].sum(0)
    return (part[whole > 0] / whole[whole > 0]).mean() if whole.any() else 0.0


def score_and_draws(parts, wholes, seed):
    """-> the score, and the scores of 1000 resamples of clusters"""
    return score_of(parts, wholes), common.bootstrap(lambda drawn: score_of(parts, wholes, drawn), len(parts), seed)


def chance(benchmark, lines):
    """What guessing among the options is worth, by the benchmark's own rule"""
    guess = [1 / len(line["options"]) if line["options"] else 0.0 for line in lines]
    return float(score_of(*cluster_sums(benchmark, [{**line, "understood": ""} for line in lines], guess)))


def estimate(benchmark, lines, measures, seed):
    """{run: its lines, about the same rows} -> {run: {measure: [value, low, high], measure_vs_first: the same of the
    difference to the first run, n_measure: rows that have it, "n": rows, "gained", "lost": rows that it gets right, or
    wrong, unlike the first}}"""
    first, table, drawn = next(iter(lines)), {}, {}
    for run, rows in lines.items():
        table[run] = {"n": len(rows)}
        for measure in measures:
            usable = [row for row in rows if row[measure] is not None]
            if not usable:
                continue
            if measure == "blind_score":
                usable = [{**row, "understood": row["blind_understood"]} for row in usable]
            drawn[run, measure] = score_and_draws(*cluster_sums(
                benchmark, usable, [row[measure] for row in usable]), seed)
            table[run][measure], table[run][f"n_{measure}"] = common.interval(*drawn[run, measure]), len(usable)
            table[run][measure + "_vs_first"] = common.interval(*(
                mine - its for mine, its in zip(drawn[run, measure], drawn[first, measure])))
        changes = flips(lines[first], rows)
        table[run] |= {"gained": changes.count(1), "lost": changes.count(-1)}
    return table


def flips(first, rows):
    """For each row 1 if it is right where the first run is wrong, -1 if wrong where that is right, else 0"""
    return [int(row["score"] >= 0.5) - int(other["score"] >= 0.5) for other, row in zip(first, rows, strict=True)]


def own_groups(lines):
    """{name: row numbers}: everything, each category and below it its kinds"""
    found, parents = {"all": list(range(len(lines)))}, {}
    for i, line in enumerate(lines):
        for name in dict.fromkeys((line["category"], line["kind"])):
            if name not in (None, "all"):
                found.setdefault(name, []).append(i)
                parents.setdefault(name, line["category"])
    heads = list(dict.fromkeys(parents.values()))
    return dict(sorted(found.items(), key=lambda item: (
        item[0] != "all", heads.index(parents[item[0]]) if item[0] in parents else 0, item[0] not in heads)))


OWN_MEASURES = ("decoded", "extracted", "restricted", "blind_score")


def extracted(line):
    """The score of what follows the last "answer is" of an answer to own data (the whole answer, if it does not say
    that); None if no text was written"""
    said = line.get("prediction")
    return None if said is None else score(said.lower().rpartition("answer is")[2].lstrip(": "), line["answer"])


def compare_own(questions, lines, seed):
    """-> {run: {group: what `estimate` gives}} """
    table = {run: {} for run in lines}
    lines = {run: [{**row, "extracted": extracted(row)} for row in rows] for run, rows in lines.items()}
    for group, members in own_groups(next(iter(lines.values()))).items():
        part = {run: [rows[i] for i in members] for run, rows in lines.items()}
        for run, cell in estimate(questions.benchmark, part, OWN_MEASURES, seed).items():
            table[run][group] = cell
    return table


def compare_benchmarks(sets, lines, dropped, args):
    """-> {run: {benchmark: what `estimate` gives of "score" and "blind_score", chance, how many answers were not
    understood, which rows are not in it, and all numbers of the official scorer}}"""
    table = {run: {} for run in next(iter(lines.values()))}
    for name, questions in sets.items():
        benchmark, guess = questions.benchmark, chance(questions.benchmark, next(iter(lines[name].values())))
        for run, cell in estimate(benchmark, lines[name], ("score", "blind_score"), args.seed).items():
            rows = lines[name][run]
            table[run][name] = cell | {
                "chance": guess, "metric": benchmark.metric, "scale": benchmark.scale, "source": questions.source,
                "n_logprob": sum(row["decoded"] is None for row in rows),
                "not_understood": sum(row["understood"] is None for row in rows),
                "skipped": dict(questions.skipped), "dropped": questions.dropped + dropped[name]}
            if benchmark.score:
                said = [{**row, "prediction": row["choice"] if row["prediction"] is None else row["prediction"]}
                        for row in rows]
                table[run][name]["scorer"] = benchmark.score(said, args.profile)
    return table


def averages(cells, groups):
    """{benchmark: its cell} of one run -> {group: mean of its benchmarks, in %}, of groups that were asked whole, and
    "overall", their mean if there are all: the paper's table, in which MME's perception points count a twentieth"""
    means = {group: float(np.mean([100 * cells[name]["score"][0] for name in names]))
             for group, names in groups.items() if all(name in cells for name in names)}
    return {**means, "overall": float(np.mean(list(means.values())))} if len(means) == len(groups) else means


# ---- showing ---------------------------------------------------------------------------------------------------------


def shown(cell, scale=100, sign=False):
    """[value, low, high] -> "61.2 [58.0, 64.1]" """
    return common.percent([each * scale / 100 for each in cell], sign)


def own_tables(table, args):
    """-> [(title, heads, lines)]: a line is a run, with its name first; heads name its cells"""
    first, tables = next(iter(table)), []
    for measure in OWN_MEASURES:
        groups = [g for g in table[first] if measure in table[first][g]]
        if groups:
            title = "restricted, grey picture" if measure == "blind_score" else measure
            title += f", % right of {table[first]['all']['n_' + measure]} " + "random " * bool(args.limit) + \
                f"questions of {args.data} [95 % interval over pictures]"
            tables.append((title + f", read by {args.reader}" * bool(args.reader),
                           ["questions", *groups],
                           [[run, *(shown(table[run][g][measure]) for g in groups)] for run in table]))
    cells = [(m, g) for m in ("decoded", "extracted", "restricted")
             for g in ("all", "vision-centric", "knowledge")
             if m in table[first].get(g, {})]
    lines = [[run, *(shown(table[run][g][m + "_vs_first"], sign=True) for m, g in cells),
              f"+{table[run]['all']['gained']} -{table[run]['all']['lost']}"] for run in list(table)[1:]]
    if lines:
        tables.append((f"difference to {first}, question by question [95 % interval]",
                       ["questions", *(f"{m} {g}" for m, g in cells), "gained and lost"], lines))
    return tables


def benchmark_tables(table, sets, groups, args):
    """The same of benchmarks: a head for each of them, and for each average"""
    first, titles = next(iter(table)), [questions.benchmark.title for questions in sets.values()]
    rows, means = table[first].values(), {run: averages(table[run], groups) for run in table}
    blank, cell = [""] * len(means[first]), lambda row, measure: shown(row[measure], row["scale"])
    title = f"profile {args.profile} [95 % interval over pictures, or what counts together]"
    if args.limit:
        title += f"; about {args.limit} random rows of each, seed {args.seed}"
    if args.score == "logprob":
        title += "; logprob: the likeliest option is scored, usually easier than what is written"
    lines = [["metric", *(row["metric"] + (", logprob" if row["n_logprob"] == row["n"] else ", partly logprob") *
                          bool(row["n_logprob"]) for row in rows), *blank],
             ["rows", *(str(row["n"]) for row in rows), *blank],
             ["chance", *(f"{row['chance'] * row['scale']:.1f}" if row["chance"] else "" for row in rows), *blank]]
    for run, cells in table.items():
        lines.append([run, *(cell(row, "score") for row in cells.values()),
                      *(f"{value:.1f}" for value in means[run].values())])
        if args.blind:
            lines.append([f"{run}, blind", *(cell(row, "blind_score") for row in cells.values()), *blank])
    tables = [(title, ["benchmark", *titles, *(f"average, {group}" for group in means[first])], lines)]
    lines = [[run, *(f"{shown(row['score_vs_first'], row['scale'], True)} +{row['gained']} -{row['lost']}"
                     for row in cells.values())] for run, cells in list(table.items())[1:]]
    if lines:
        tables.append((f"difference to {first} on the same resamples [95 % interval], rows gained and lost",
                       ["benchmark", *titles], lines))
    lines = [[f"not understood: {run}", *(str(row["not_understood"]) for row in cells.values())]
             for run, cells in table.items()]
    lines.append(["unreadable pictures or rows", *(str(len(row["dropped"])) for row in rows)])
    lines.append(["skipped", *("; ".join(f"{n} {reason}" for reason, n in row["skipped"].items()) for row in rows)])
    return [*tables, ("answers that say nothing that can be scored, and rows that were not asked",
                      ["benchmark", *titles], lines)]


def scorer_tables(table, sets):
    """-> [(title, heads, lines)]: everything that the official scorers say, as they say it"""
    keys = [(name, key) for name, cell in next(iter(table.values())).items() for key in cell.get("scorer", ())]
    lines = [[run, *(f"{cells[name]['scorer'].get(key, float('nan')):.4g}" for name, key in keys)]
             for run, cells in table.items()]
    heads = ["number", *(f"{sets[name].benchmark.title} {key}" for name, key in keys)]
    return [("all numbers of the official scorers", heads, lines)] if keys else []


def turned(title, heads, lines):
    """The same table with a row for each head"""
    names, *rows = zip(heads, *lines)
    return title, list(names), list(map(list, rows))


def markdown(tables):
    """The tables for a README"""
    parts, line = [], lambda cells: "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    for title, heads, rows in tables:
        parts.append("\n".join([f"**{title}**", "", line(heads), "|" + "---|" * len(heads), *map(line, rows)]))
    return "\n\n".join(parts) + "\n"


def flipped_cards(sets, answers, args, draw_map):
    """Cards for the gallery: of each set up to --gallery random questions that some model answers unlike the first.

    answers: {set: {run: its lines}}; draw_map(run, image, question, text) -> map or None. -> cards, how many questions
    there were to choose from"""
    chosen, said, n_flipped = [], defaultdict(list), 0
    for name, questions in sets.items():
        first, *others = answers[name].values()
        flipped = np.flatnonzero(np.any([flips(first, rows) for rows in others], axis=0)) if others else []
        n_flipped += len(flipped)
        drawn = sorted(np.random.default_rng(args.seed).permutation(flipped)[:args.gallery].tolist())
        records = {record["row"]: record for record in questions.records}
        chosen += [(name, i, record, questions.picture(record)) for i in drawn for record in [records[first[i]["row"]]]]
    for run in next(iter(answers.values())):  # a run at a time: one model in memory
        for name, i, record, image in tqdm(chosen, desc=f"{run} maps", disable=not chosen):
            line = answers[name][run][i]
            text = line["choice"] if line["prediction"] is None else line["prediction"]
            said[name, i].append(gallery.Answer(run, text, float(line["score"]),
                                                draw_map(run, image, record["question"], text)))
    as_text = lambda gold: ", ".join(dict.fromkeys(gold)) if isinstance(gold, list) else str(gold)
    return [gallery.Card(sets[name].benchmark.title, f"row {record['row']}", image, record["question"],
                         as_text(record["gold"]), said[name, i]) for name, i, record, image in chosen], n_flipped
