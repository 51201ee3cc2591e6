/* the list of latents: only the lines in sight exist, fetched page by page */
const LINE = 62, PAGE = 50;
const list = { key: "", total: 0, pages: new Map(), stop: null };

function listQuery() {
  return new URLSearchParams({ sort: sortedBy(), order: state.order, text: state.q, label: state.label || "-1", least: least() }).toString();
}

async function showList() {
  const key = `${runNumber()}?${listQuery()}`;
  if (key === list.key) return markLine();
  list.stop?.abort();
  Object.assign(list, { key, pages: new Map(), stop: new AbortController() });
  await fetchPage(0);
  $("scroll").scrollTop = 0;
  $("count").textContent = `${whole(list.total)} of ${whole(runAbout.d_sae)} latents` + (list.total ? "" : ": none fits; widen the filters");
  await drawLines();
}

async function fetchPage(page) {
  const { key, pages, stop } = list;
  if (pages.has(page)) return pages.get(page);
  const fetched = ask(api(`/latents?${listQuery()}&start=${page * PAGE}&count=${PAGE}`), { signal: stop.signal }).then((found) => {
    if (list.key === key) list.total = found.total;
    return found.rows;
  });
  pages.set(page, fetched);
  fetched.catch(() => pages.delete(page));
  return fetched;
}

async function drawLines() {
  const { key } = list, box = $("scroll");
  $("rows").style.height = `${list.total * LINE}px`;
  const first = Math.max(0, Math.floor(box.scrollTop / LINE) - 6);
  const last = Math.min(list.total, Math.ceil((box.scrollTop + box.clientHeight) / LINE) + 6);
  const lines = [];
  for (let page = Math.floor(first / PAGE); page * PAGE < last; page++) {
    const rows = await fetchPage(page);
    rows.forEach((row, i) => {
      const place = page * PAGE + i;
      if (place >= first && place < last) lines.push(line(row, place));
    });
  }
  if (list.key !== key) return;
  $("rows").replaceChildren(...lines);
  markLine();
}

function line(row, place) {
  const sorted = sortedBy() === "latent" ? "" : sortedBy();
  const made = el("div.row", { role: "option", title: `Latent ${row.latent}, fires on ${whole(row.images_fired)} pictures`, onclick: () => go({ latent: String(row.latent), picture: "", value: "" }) },
    el("div", {}, el("b", {}, latentName(row)), el("small", {}, `${row.name ? `#${row.latent} · ` : ""}${classShare(row)}on ${whole(row.images_fired)}`)),
    el("div.thumbs", {}, ...row.images.slice(0, 3).map((i) => image(`image:${i}`))),
    sparkline(runAbout.columns, row.percentiles, sorted),
    el("div.value", {}, sorted ? figures(row.values[sorted]) : ""));
  made.dataset.latent = row.latent;
  made.style.top = `${place * LINE}px`;
  return made;
}

const classShare = (row) => (row.label && row.values.purity !== undefined ? `${Math.round(100 * row.values.purity)} % ${row.label} · ` : "");

function markLine() {
  for (const row of document.querySelectorAll(".row")) {
    const on = row.dataset.latent === state.latent;
    row.classList.toggle("on", on);
    row.setAttribute("aria-selected", on);
  }
}

/* the latent `by` lines below the one shown, or the first; without a step in the history where it was not asked for */
async function stepInList(by, asked = true) {
  if (!list.total) return;
  let at = -1;
  for (const [page, rows] of list.pages) {
    const i = (await rows).findIndex((row) => String(row.latent) === state.latent);
    if (i >= 0) at = page * PAGE + i;
  }
  const next = at < 0 ? 0 : Math.min(list.total - 1, Math.max(0, at + by));
  const rows = await fetchPage(Math.floor(next / PAGE));
  const box = $("scroll"), top = next * LINE;
  if (top < box.scrollTop) box.scrollTop = top;
  if (top + LINE > box.scrollTop + box.clientHeight) box.scrollTop = top + LINE - box.clientHeight;
  go({ latent: String(rows[next % PAGE].latent), picture: "", value: "" }, asked);
}

/* the controls above the list, from what the run has */
function fillFilters() {
  $("sort").replaceChildren(...runAbout.columns.map((c) => el("option", { value: c.name, title: c.about }, c.title)), el("option", { value: "latent" }, "Number"));
  $("label").replaceChildren(el("option", { value: "" }, "any class"), ...runAbout.classes.map((name, i) => el("option", { value: String(i) }, name)));
  $("label").hidden = !runAbout.classes.length;
  if (state.label && !runAbout.classes[state.label]) state.label = "";
}
function setFilters() {
  $("sort").value = sortedBy();
  $("label").value = state.label;
  $("order").textContent = state.order === "desc" ? "↓" : "↑";
  $("order").title = state.order === "desc" ? "High ones first" : "Low ones first";
  for (const [id, value] of [["text", state.q], ["least", least()]]) if (document.activeElement !== $(id)) $(id).value = value;
}
