"""The live page: it asks `/status` every two seconds and loads nothing from elsewhere."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>offload_adam</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.5rem; }
dt { opacity: .7; } dd { margin: 0; font-variant-numeric: tabular-nums; }
#state { font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .1rem 1.5rem .1rem 0; }
th { opacity: .7; font-weight: normal; }
</style>
</head>
<body>
<h1>offload_adam</h1>
<p id="state">waiting for the first step</p>
<div class="wide"><table id="ranks"></table></div>
<dl id="values"></dl>
<script>
const rows = (values, prefix) => Object.entries(values).flatMap(([name, value]) =>
  value !== null && typeof value === "object"
    ? rows(value, prefix + name + " ")
    : [[prefix + name, value]]);
const cell = (kind, value) => {
  const made = document.createElement(kind);
  made.textContent = value ?? "";
  return made;
};
const row = (kind, values) => {
  const made = document.createElement("tr");
  made.append(...values.map(value => cell(kind, value)));
  return made;
};
function table(ranks) {
  if (!ranks.length) return [];
  const names = Object.keys(ranks[0]);
  return [row("th", names), ...ranks.map(rank => row("td", names.map(name => rank[name])))];
}
const shown = (name, value) => {
  if (typeof value !== "number") return value;
  if (name.startsWith("memory_bytes")) return (value / 2 ** 20).toFixed(1) + " MiB";
  return Number(value.toPrecision(6));
};
async function refresh() {
  const state = document.getElementById("state");
  try {
    const {last, ranks = [], ...rest} = await (await fetch("/status")).json();
    state.textContent = "step" in last ? "step " + last.step : "waiting for the first step";
    document.getElementById("ranks").replaceChildren(...table(ranks));
    document.getElementById("values").replaceChildren(...rows({...last, ...rest}, "").flatMap(
      ([name, value]) => [cell("dt", name), cell("dd", shown(name, value))]));
  } catch {
    state.textContent = "the run does not answer; it may be over";
  }
}
refresh();
setInterval(refresh, 2000);
</script>
</body>
</html>
"""
