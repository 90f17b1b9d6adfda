// API keys: which there are and when each was last used; a new one, shown once; and the end of one.

import { Asking, pagesOf, post, request, query as queryString } from "./api.js";
import { fill, h, raw, redraw } from "./dom.js";
import { t, time } from "./i18n.js";
import { busy, confirmed, copyButton, empty, everyoneBox, listTable, moreButton, problemCard, toast } from "./parts.js";
import { teamTabs } from "./team.js";

const PAGE = 50;
const DAY_MS = 86_400_000;
const SCOPES = ["jobs:read", "jobs:write", "datasets:write", "metrics:read", "keys:write", "operator"];
const USUAL = new Set(["jobs:read", "jobs:write", "datasets:write"]);
const LIFETIMES = ["30", "90", "365", ""];

export async function keysView(_parameters, query, holder) {
  const isOperator = holder.scopes.includes("operator");
  const mayWrite = holder.scopes.includes("keys:write");
  let whose = query.get("owner") ?? "";
  let pages = 1;
  const asking = new Asking();
  const notes = h("div", { class: "notes", "aria-live": "polite" });
  const bar = h("div", { class: "filters" });
  const list = h("div", { id: "keys" }, busy());
  const form = mayWrite ? newKey() : h("p", { class: "hint" }, t("keys.readonly"), " ", raw("keys:write", { class: "code" }));
  const element = h("div", {}, h("h1", { tabindex: "-1" }, t("team.title")), teamTabs("keys"), form, notes, bar, list);

  function drawFilters() {
    if (!isOperator) return;
    redraw(bar, everyoneBox(whose === "*", (owner) => (location.hash = `#/keys${queryString({ owner })}`)));
  }

  function refresh() {
    asking.ask(() => pagesOf("/keys", { owner: whose, limit: PAGE }, pages), { answered: draw, refused: (error) => fill(list, problemCard(error, { again: refresh })) });
  }

  function draw({ data, has_more: more }) {
    if (!data.length) {
      fill(list, empty(t("keys.none")));
      return;
    }
    const heads = ["name", "scopes", "state", "created", "used", "expires"].map((name) => t(`keys.${name}`));
    const last = mayWrite ? h("span", { class: "sr-only" }, t("keys.revoke")) : null;
    redraw(
      list,
      listTable("keys", t("tab.keys"), [...heads, last], data.map(row)),
      moreButton(more, () => ((pages += 1), refresh())),
    );
  }

  function row(key) {
    return h(
      "tr",
      { data: { key: key.id } },
      h("td", { class: "name" }, key.name ? raw(key.name, { class: "strong breaks" }) : h("span", { class: "hint" }, t("keys.unnamed")), h("div", { class: "sub" }, key.hint ? raw(`${key.hint}…`, { class: "code" }) : null, whose ? raw(key.owner, { class: "tag" }) : null)),
      h("td", {}, key.scopes.map((scope) => [raw(scope, { class: "tag" }), " "])),
      h("td", {}, h("span", { class: `badge key-${key.status}` }, t(`keys.status.${key.status}`))),
      h("td", { class: "age" }, time(key.created_at)),
      h("td", { class: "age" }, key.last_used_at ? time(key.last_used_at) : h("span", { class: "hint" }, t("keys.unused"))),
      h("td", { class: "age" }, key.expires_at ? time(key.expires_at) : t("keys.never")),
      mayWrite ? h("td", {}, key.status === "valid" ? h("button", { type: "button", class: "quiet danger", data: { action: "revoke", focus: `revoke-${key.id}` }, onclick: () => revoke(key) }, t("keys.revoke")) : null) : null,
    );
  }

  async function revoke(key) {
    const name = key.name ?? key.hint ?? key.id;
    if (!(await confirmed({ title: t("keys.revoke.title", { name }), text: t("keys.revoke.text"), action: t("keys.revoke"), danger: true }))) return;
    fill(notes);
    try {
      await request(`/keys/${encodeURIComponent(key.id)}`, { method: "DELETE" });
      toast(t("keys.revoked", { name }));
    } catch (error) {
      fill(notes, problemCard(error));
    }
    refresh();
  }

  /** Only scopes that the key of this session has can be given. */
  function newKey() {
    const name = h("input", { type: "text", id: "key-name", maxlength: 100, autocomplete: "off" });
    const owner = isOperator ? h("input", { type: "text", id: "key-owner", maxlength: 100, autocomplete: "off", placeholder: holder.owner, translate: "no" }) : null;
    const boxes = SCOPES.filter((scope) => holder.scopes.includes(scope)).map((scope) => h("input", { type: "checkbox", value: scope, checked: USUAL.has(scope), data: { scope } }));
    const days = h("select", { id: "key-days" }, LIFETIMES.map((value) => h("option", { value, selected: value === "90" }, value ? t("keys.days", { n: Number(value) }) : t("keys.never"))));
    const create = h("button", { type: "submit", class: "primary" }, t("keys.create"));
    const field = (id, label, control) => h("div", { class: "field" }, h("label", { for: id }, label), control);
    const scopes = h("fieldset", {}, h("legend", {}, t("keys.scopes")), boxes.map((box) => h("label", { class: "scope" }, box, " ", raw(box.value, { class: "code" }), " ", h("span", { class: "sub" }, t(`keys.scope.${box.value}`)))));
    async function submit(event) {
      event.preventDefault();
      fill(notes);
      const body = { scopes: boxes.filter((box) => box.checked).map((box) => box.value) };
      if (name.value.trim()) body.name = name.value.trim();
      if (owner?.value.trim()) body.owner = owner.value.trim();
      if (days.value) body.expires_at = new Date(Date.now() + Number(days.value) * DAY_MS).toISOString();
      create.disabled = true;
      try {
        const made = await post("/keys", body);
        name.value = "";
        fill(notes, shownOnce(made));
        refresh();
      } catch (error) {
        fill(notes, problemCard(error));
      }
      create.disabled = false;
    }
    return h("details", { class: "card new-key" }, h("summary", {}, t("keys.new")), h("form", { class: "fields", onsubmit: submit }, field("key-name", t("keys.name"), name), owner && field("key-owner", t("keys.owner"), owner), field("key-days", t("keys.expires"), days), h("div", { class: "wide" }, scopes), h("div", { class: "wide actions" }, create)));
  }

  function shownOnce(made) {
    const secret = h("input", { type: "text", readonly: true, value: made.key, class: "code secret", "aria-label": t("keys.secret"), translate: "no", onfocus: () => secret.select() });
    return h("div", { class: "card good", role: "status" }, h("p", { class: "strong" }, t("keys.once")), h("p", { class: "secret-row" }, secret, copyButton(made.key, t("copy"))), h("p", {}, h("button", { type: "button", onclick: () => fill(notes) }, t("keys.kept"))));
  }

  drawFilters();
  refresh();
  return {
    element,
    go(_ignored, next) {
      whose = next.get("owner") ?? "";
      pages = 1;
      drawFilters();
      refresh();
      return true;
    },
    close() {
      asking.stop();
      fill(notes);
    },
  };
}
