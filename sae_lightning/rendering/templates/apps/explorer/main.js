/* start, and what happens on keys, filters and uploads */
let runShown = null; // the number of the run that the page is filled with

async function show() {
  if (runShown !== runNumber()) {
    $("run").value = String(runNumber());
    $("detail").replaceChildren(el("p.soft.waiting", {}, "Opening the run; the first time its pictures are encoded …"));
    const run = runNumber(), found = await ask(api());
    if (run !== runNumber()) return;
    runAbout = found;
    runShown = run;
    document.title = `${found.title} · Explorer`;
    $("about").textContent = `${whole(found.alive)} of ${whole(found.d_sae)} latents fire on ${whole(found.n_images)} ${found.split} pictures` +
      (found.evaluated ? "" : "; more figures after evaluate.py metrics=visaebench");
    $("about").title = found.name;
    fillFilters();
  }
  setFilters();
  const shown = showList();
  document.body.classList.toggle("detail", Boolean(state.latent || state.picture));
  if (state.picture) await showPicture();
  else if (state.latent) await showLatent();
  else if (matchMedia("(min-width: 861px)").matches) await shown.then(() => stepInList(1, false));
  await shown;
}

async function upload(file) {
  if (!file) return;
  toast("Reading the picture …");
  try {
    const found = await ask(`${HOME}api/uploads`, { method: "POST", headers: { "content-type": file.type || "application/octet-stream" }, body: file });
    hush();
    go({ picture: `upload:${found.upload}`, latent: "", value: "" });
  } catch (error) {
    failed(error);
  }
}

function listen() {
  let waits;
  const soon = (changes) => { clearTimeout(waits); waits = setTimeout(() => go(changes()), 180); };
  $("text").addEventListener("input", () => soon(() => ({ q: $("text").value })));
  $("least").addEventListener("input", () => soon(() => ({ least: $("least").value && String(Math.max(0, Math.floor(Number($("least").value) || 0))) })));
  $("sort").addEventListener("change", () => go({ sort: $("sort").value }));
  $("label").addEventListener("change", () => go({ label: $("label").value }));
  $("order").addEventListener("click", () => go({ order: state.order === "desc" ? "asc" : "desc" }));
  $("run").addEventListener("change", () => go({ run: runs[Number($("run").value)].name, latent: "", value: "", ...(state.picture.startsWith("upload:") ? {} : { picture: "" }) }));
  $("file").addEventListener("change", () => { upload($("file").files[0]); $("file").value = ""; });
  $("toast").addEventListener("click", hush);
  $("scroll").addEventListener("scroll", () => drawLines().catch(failed), { passive: true });
  addEventListener("resize", () => drawLines().catch(failed));
  addEventListener("popstate", () => { readAddress(); show().catch(failed); });
  addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
  addEventListener("dragleave", () => document.body.classList.remove("dropping"));
  addEventListener("drop", (event) => { event.preventDefault(); document.body.classList.remove("dropping"); upload(event.dataTransfer.files[0]); });
  addEventListener("paste", (event) => { if (event.clipboardData.files.length) upload(event.clipboardData.files[0]); });
  addEventListener("keydown", (event) => {
    const typing = event.target.matches("input, select, textarea");
    if (event.key === "Escape") return typing ? event.target.blur() : state.picture ? go({ picture: "", value: "" }) : go({ latent: "" });
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    const does = { j: () => stepInList(1), ArrowDown: () => stepInList(1), k: () => stepInList(-1), ArrowUp: () => stepInList(-1),
      o: toggleOverlay, h: toggleHeat, u: () => $("file").click(), "/": () => $("text").focus() }[event.key];
    if (!does) return;
    event.preventDefault();
    Promise.resolve(does()).catch(failed);
  });
}

async function start() {
  readAddress();
  listen();
  runs = await ask(`${HOME}api/runs`);
  $("run").replaceChildren(...runs.map((run, i) => el("option", { value: String(i), title: run.name }, run.title)));
  if (/^[0-9]+$/.test(state.run)) state.run = runs[Number(state.run)]?.name ?? "";
  await show();
}
start().catch(failed);
