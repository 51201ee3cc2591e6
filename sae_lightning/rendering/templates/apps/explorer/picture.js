/* the page of one picture: its latents, one of which can be turned */
let captionsFor = {}; // by run: why there are none, "" where there are

async function showPicture() {
  const picked = state.picture, found = await ask(pictureApi(picked) + (state.latent ? `?latent=${state.latent}` : ""));
  if (state.picture !== picked) return;
  if (!state.latent && found.latents.length) state.latent = String(found.latents[0].latent);
  const latent = state.latent, own = picked.startsWith("upload:");
  const title = own ? "Your picture" : found.label ? `A picture of class ${found.label}` : `Picture ${found.number}`;
  const over = overlayOn() && latent ? latent : null;
  fill($("detail"),
    el("div.head", {}, backButton(), el("h2", {}, title, el("small", {}, own ? "held in memory only" : `picture ${found.number} of ${runAbout.split}`)), el("span.grow"), overlayButton()),
    found.caption ? el("p.soft", {}, `“${found.caption}”`) : null,
    el("div.seen", {},
      el("figure", {}, image(picked, over, 1024, title)),
      el("div", {}, el("h3", {}, "Its latents", el("small", {}, `the strongest of ${whole(found.active)} that fire, with their activation`)),
        el("div.chips", {}, ...found.latents.map((row) => chip(row, figures(row.value), () => go({ latent: String(row.latent), value: "" }),
          String(row.latent) === latent, runAbout.patches ? image(picked, row.latent) : null))))),
    latent ? turnBox(found, latent) : null,
    keys());
  if (latent) await turned(found, latent);
}

/* slider and number of the latent in focus; its value in this picture is where it starts */
function turnBox(found, latent) {
  const here = found.latents.find((row) => String(row.latent) === latent);
  const peak = here?.peak || 1, now = here?.value || 0;
  const value = state.value === "" ? now : Number(state.value);
  const most = Math.max(3 * peak, Math.abs(value));
  const turn = (to) => go({ value: String(Number(to)) });
  const range = el("input", { type: "range", min: String(-peak), max: String(most), step: String(most / 200), "aria-label": "Value" });
  const exact = el("input", { type: "number", step: "any", "aria-label": "Value" });
  range.value = value;
  exact.value = Number(value.toPrecision(4));
  range.addEventListener("input", () => (exact.value = Number(Number(range.value).toPrecision(4))));
  range.addEventListener("change", () => turn(range.value));
  exact.addEventListener("change", () => exact.value !== "" && Number.isFinite(Number(exact.value)) && turn(exact.value));
  return el("div", {},
    el("h3", {}, here?.name ? `Turn “${here.name}”, latent ${latent}` : `Turn latent ${latent}`,
      el("small", {}, `here ${figures(now)}, at its peak ${figures(peak)}`)),
    el("div.panel.turn", {},
      el("div.line", {}, range, exact,
        el("button", { type: "button", onclick: () => turn(0) }, "Off"),
        el("button", { type: "button", onclick: () => turn(peak) }, "Peak"),
        el("button", { type: "button", onclick: () => turn(3 * peak) }, "3 × peak"),
        el("button", { type: "button", onclick: () => go({ value: "" }) }, "As it is"),
        el("button", { type: "button", onclick: () => go({ picture: "", value: "" }) }, "About this latent")),
      el("div", { id: "said" }), el("div", { id: "near" })));
}

async function turned(found, latent) {
  const key = JSON.stringify(state), still = () => JSON.stringify(state) === key && $("near");
  const here = found.latents.find((row) => String(row.latent) === latent);
  const asItIs = state.value === "", value = asItIs ? (here?.value ?? 0) : Number(state.value);
  const sent = { latent: Number(latent), value };
  const near = await post(`${pictureApi(state.picture)}/turn`, sent);
  if (!still()) return;
  const known = new Set(near.before.map((item) => item.image));
  const row = (items, changed) => el("div.pics", {}, ...items.map((item) =>
    figure({ ...item, label: (changed && !known.has(item.image) ? "● " : "") + item.label }, figures(item.cosine), null, latent)));
  $("near").replaceChildren(el("h3", {}, "Nearest pictures", el("small", {}, "cosine of features")), row(near.before, false),
    ...(asItIs ? [el("p.soft", {}, "Move the slider to see which pictures are nearest then.")]
      : [el("h3", {}, `Nearest with it at ${figures(value)}`, el("small", {}, "on all tokens; ● is new")), row(near.after, true)]));
  await caption(sent, asItIs, still);
}

async function caption(sent, asItIs, still) {
  const run = runNumber();
  captionsFor[run] ??= (await ask(api("/captions"))).why_not;
  if (!still()) return;
  if (captionsFor[run]) return $("said").replaceChildren(el("p.soft", {}, `No captions: ${captionsFor[run]}`));
  $("said").replaceChildren(el("p.soft.waiting", {}, "The captioner is looking …"));
  const said = await post(`${pictureApi(state.picture)}/caption`, sent);
  if (!still()) return;
  const before = new Set(said.before.split(/\s+/));
  const marked = said.after.split(/(\s+)/).map((word) => (word.trim() && !before.has(word) ? el("mark", {}, word) : word));
  $("said").replaceChildren(el("dl.said", { title: said.model },
    el("dt", {}, "Caption"), el("dd", {}, said.before || "–"),
    ...(asItIs ? [] : [el("dt", {}, `at ${figures(sent.value)}`), el("dd", {}, ...(said.after ? marked : ["–"]))])));
}
