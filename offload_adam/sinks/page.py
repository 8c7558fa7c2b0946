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
</style>
</head>
<body>
<h1>offload_adam</h1>
<p id="state">waiting for the first step</p>
<dl id="values"></dl>
<script>
const rows = (values, prefix) => Object.entries(values).flatMap(([name, value]) =>
  value !== null && typeof value === "object"
    ? rows(value, prefix + name + " ")
    : [[prefix + name, value]]);
async function refresh() {
  const state = document.getElementById("state");
  try {
    const status = await (await fetch("/status")).json();
    const {last, ...rest} = status;
    state.textContent = "step" in last ? "step " + last.step : "waiting for the first step";
    document.getElementById("values").replaceChildren(...rows({...last, ...rest}, "").flatMap(
      ([name, value]) => {
        const term = document.createElement("dt"), text = document.createElement("dd");
        term.textContent = name;
        text.textContent = typeof value === "number" ? Number(value.toPrecision(6)) : value;
        return [term, text];
      }));
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
