// Logging in with an API key: it is sent once, exchanged for a cookie, and forgotten.

import { Problem, logIn } from "./api.js";
import { fill, h, raw } from "./dom.js";
import { t } from "./i18n.js";
import { problemCard } from "./parts.js";

export function logInView(onLoggedIn) {
  const field = h("input", { id: "key", type: "password", autocomplete: "current-password", required: true, spellcheck: "false", "aria-describedby": "key-hint", placeholder: "grpo_…" });
  const button = h("button", { type: "submit", class: "primary" }, t("login.action"));
  const trouble = h("div", {});
  const form = h(
    "form",
    { class: "card login", onsubmit: send },
    h("h1", {}, t("login.title")),
    h("label", { for: "key" }, t("login.key")),
    field,
    h("p", { class: "hint", id: "key-hint" }, t("login.hint"), " ", raw("grpo keys create --owner NAME", { class: "code" })),
    trouble,
    button,
  );

  async function send(event) {
    event.preventDefault();
    button.disabled = true;
    fill(trouble);
    try {
      const holder = await logIn(field.value);
      field.value = "";
      onLoggedIn(holder);
    } catch (error) {
      fill(trouble, error instanceof Problem && error.status === 401 ? h("div", { class: "card danger", role: "alert" }, h("p", { class: "strong" }, t("login.wrong")), h("p", {}, t("login.remedy"))) : problemCard(error));
      field.focus();
      field.select();
    } finally {
      button.disabled = false;
    }
  }
  return form;
}
