import js from "@eslint/js";
import globals from "globals";

export default [
  { ignores: ["**/vendor/**", "api/static/**", "site/**", "build/**", ".venv*/**"] },
  js.configs.recommended,
  { files: ["tests/**/*.mjs"], languageOptions: { globals: globals.node } },
  {
    files: ["api/page/static/js/**/*.js"],
    languageOptions: { globals: { ...globals.browser, uPlot: "readonly", Diff: "readonly" } },
    rules: {
      eqeqeq: "error",
      "no-var": "error",
      "prefer-const": "error",
      "no-shadow": "error",
      "consistent-return": "error",
      "no-unused-vars": ["error", { argsIgnorePattern: "^_" }],
    },
  },
];
