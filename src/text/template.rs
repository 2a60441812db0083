//! Chat templates: a conversation to the text that a model was trained on.
//!
//! Templates are Jinja, written for Python's `jinja2` as `transformers` sets it up; minijinja renders them here the same way.

mod continuation;
mod fuel;
mod functions;
mod guard;
mod json;
mod made;
mod markup;
mod methods;
mod python;
mod slice;
mod traits;
mod value;

use std::collections::BTreeMap;
use std::fmt::Display;

use minijinja::machinery::{Instructions, eval, get_compiled_template, make_string_output};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, Template, Value as Variable};
use serde_json::{Map, Value};

use super::user_text::SpecialTexts;
use crate::error::{Error, Kind, Result};
pub use continuation::Tail;
use guard::guarded;
use traits::Traits;
pub use traits::without_notes;

/// Fuel of one render: instructions, and 64-byte units of data. A long conversation needs far less. It is about a second of work.
const FUEL: u64 = 10_000_000;
/// Maximum nesting of macros, loops and expressions.
const RECURSION_LIMIT: usize = 200;

/// Names of the templates: the one for all conversations, and the one for conversations with tools, if the model has both.
const DEFAULT: &str = "chat";
const TOOLS: &str = "tool use";

/// How a rendered text ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// After the last message, as the template closes it.
    Closed,
    /// With the header of the assistant's answer, which comes next (`add_generation_prompt`).
    Answer,
    /// Within the last message, which the model is to continue (`continue_final_message`).
    OpenMessage,
}

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Map<String, Value>,
    traits: Traits,
    /// The special tokens that users and tools may not write.
    escaped: Option<SpecialTexts>,
}

impl ChatTemplate {
    /// Compiles `source`. `special_tokens` are variables of the template: `bos_token`, `eos_token`, ...
    ///
    /// # Errors
    /// `invalid_template` says where the syntax is at fault.
    pub fn new(source: &str, special_tokens: &Map<String, Value>) -> Result<Self> {
        Self::with_fuel(source, special_tokens, FUEL)
    }

    fn with_fuel(source: &str, special_tokens: &Map<String, Value>, fuel: u64) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        environment.set_syntax(syntax.map_err(|e| Error::internal(e.to_string()))?);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        methods::install(&mut environment);
        environment.set_fuel(Some(fuel));
        environment.set_recursion_limit(RECURSION_LIMIT);
        environment.set_debug(true);
        python::install(&mut environment);
        fuel::install(&mut environment);
        markup::install(&mut environment);
        environment.add_filter("tojson", json::tojson);
        environment.add_function("raise_exception", functions::raise_exception);
        add_template(&mut environment, DEFAULT, source)?;
        let mut template = Self {
            environment,
            special_tokens: special_tokens.clone(),
            traits: Traits::UNKNOWN,
            escaped: None,
        };
        template.traits = template.find_traits(source);
        Ok(template)
    }

    /// Adds another template for conversations with tools.
    ///
    /// # Errors
    /// `invalid_template` says where the syntax is at fault.
    pub fn with_tool_template(mut self, source: &str) -> Result<Self> {
        add_template(&mut self.environment, TOOLS, source)?;
        self.traits = self.find_traits(&self.source());
        Ok(self)
    }

    /// Keeps the texts of users and tools free of special tokens: [`MARK`]s separate their characters, and
    /// [`Tokenizer::encode_rendered`] removes the marks without joining the characters.
    ///
    /// [`MARK`]: super::MARK
    /// [`Tokenizer::encode_rendered`]: super::Tokenizer::encode_rendered
    #[must_use]
    pub fn with_escaped(mut self, texts: SpecialTexts) -> Self {
        self.escaped = Some(texts);
        self
    }

    /// The variables that the template reads and does not set, in alphabetical order.
    pub fn variables(&self) -> Vec<String> {
        let templates = self.environment.templates();
        let names = templates.flat_map(|(_, template)| template.undeclared_variables(false));
        let mut names: Vec<String> = names.collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// Its source, followed by that of the template for tools. Tags that only mark text are neutralized.
    pub fn source(&self) -> String {
        let templates = self.environment.templates();
        templates
            .map(|(_, template)| template.source().to_owned())
            .collect()
    }

    /// Renders a whole conversation. `messages` are `{role, content, ...}` objects, `tools` the tool descriptions for
    /// templates that know them, and `kwargs` further variables; keys of objects keep their order.
    ///
    /// # Errors
    /// `invalid_messages` (400) says what the template refuses about the messages.
    pub fn render(
        &self,
        messages: &[Value],
        tools: Option<&[Value]>,
        ending: Ending,
        kwargs: &Map<String, Value>,
    ) -> Result<String> {
        match ending {
            Ending::Closed => self.render_raw(messages, tools, false, kwargs),
            Ending::Answer => self.render_raw(messages, tools, true, kwargs),
            Ending::OpenMessage => self.render_open(messages, tools, kwargs),
        }
    }

    fn render_raw(
        &self,
        messages: &[Value],
        tools: Option<&[Value]>,
        add_generation_prompt: bool,
        kwargs: &Map<String, Value>,
    ) -> Result<String> {
        let messages = match &self.escaped {
            Some(texts) => &*texts.escape(messages),
            None => messages,
        };
        let mut variables: Vec<(&str, Variable)> = Vec::new();
        for (name, variable) in self.special_tokens.iter().chain(kwargs) {
            variables.push((name, value::from_json(variable)));
        }
        variables.push(("strftime_now", functions::strftime_now()));
        variables.push(("messages", value::from_messages(messages)));
        variables.push(("tools", tools.map_or(Variable::from(()), value::from_list)));
        variables.push(("documents", Variable::from(())));
        variables.push((
            "add_generation_prompt",
            Variable::from(add_generation_prompt),
        ));
        let with_tools = tools.is_some_and(|tools| !tools.is_empty());
        let other = with_tools.then(|| self.environment.get_template(TOOLS).ok());
        let template = other
            .flatten()
            .map_or_else(|| self.environment.get_template(DEFAULT), Ok)
            .map_err(|e| Error::internal(e.to_string()))?;
        let guarded = Guarded::of(&template).map_err(|e| invalid_template(template.name(), &e))?;
        guarded
            .render(&self.environment, Variable::from_pairs(variables))
            .map_err(|e| refusal(&e))
    }
}

/// A template whose cost is limited by its fuel.
struct Guarded<'a> {
    instructions: Instructions<'a>,
    blocks: BTreeMap<&'a str, Instructions<'a>>,
}

impl<'a> Guarded<'a> {
    fn of(template: &Template<'a, 'a>) -> Result<Self, String> {
        let compiled = get_compiled_template(template);
        let blocks = compiled.blocks.iter();
        Ok(Self {
            instructions: guarded(&compiled.instructions)?,
            blocks: blocks
                .map(|(&name, block)| Ok((name, guarded(block)?)))
                .collect::<Result<_, String>>()?,
        })
    }

    fn render(
        &self,
        environment: &Environment<'a>,
        root: Variable,
    ) -> Result<String, minijinja::Error> {
        let mut text = String::new();
        let mut out = make_string_output(&mut text);
        let none = minijinja::AutoEscape::None;
        eval(
            environment,
            &self.instructions,
            root,
            &self.blocks,
            &mut out,
            none,
        )?;
        drop(out);
        Ok(text)
    }
}

fn add_template(
    environment: &mut Environment<'static>,
    name: &'static str,
    source: &str,
) -> Result<()> {
    environment
        .add_template_owned(name, neutralize_generation_tags(source))
        .map_err(|e| invalid_template(name, &e))?;
    let template = environment.get_template(name);
    let template = template.map_err(|e| Error::internal(e.to_string()))?;
    Guarded::of(&template)
        .map(drop)
        .map_err(|e| invalid_template(name, &e))
}

fn invalid_template(name: &str, reason: &dyn Display) -> Error {
    let message = format!("the {name} template cannot be compiled: {reason}");
    Error::new(Kind::Invalid, "invalid_template", message)
}

/// The client's error if a render fails: its messages or tools do not fit the template.
fn refusal(error: &minijinja::Error) -> Error {
    let message = if let Some(message) = functions::raised(error) {
        message.to_owned()
    } else if error.kind() == ErrorKind::OutOfFuel {
        format!("the chat template needs more than {FUEL} steps for these messages")
    } else {
        format!("the chat template cannot render these messages: {error}")
    };
    Error::new(Kind::Invalid, "invalid_messages", message).with_param("messages")
}

/// `{% generation %}` marks the assistant's words for training and has no effect here. A block that only opens a scope takes its
/// place, so that the white space around it is treated as before.
fn neutralize_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let Some(end) = tag.find("%}").map(|at| at + 2) else {
            rest = tag;
            break;
        };
        let inner = tag[2..end - 2]
            .trim_start_matches(['-', '+'])
            .trim_end_matches(['-', '+']);
        let neutral = match inner.trim() {
            "generation" => tag[..end].replace("generation", "with"),
            "endgeneration" => tag[..end].replace("endgeneration", "endwith"),
            _ => {
                out.push_str("{%");
                rest = &tag[2..];
                continue;
            }
        };
        out.push_str(&neutral);
        rest = &tag[end..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn render(source: &str, messages: &Value) -> Result<String> {
        let template = ChatTemplate::new(source, &Map::new())?;
        template.render(
            messages.as_array().unwrap(),
            None,
            Ending::Closed,
            &Map::new(),
        )
    }

    #[test]
    fn json_is_written_as_python_does() {
        let messages = json!([{"z": "<a & 'b'>", "a": [1, -2.5, 1e16, 1e-7, 100.0, null, true], "é": {"\u{7f}\n": {}}}]);
        let text = render("{{ messages[0] | tojson }}", &messages).unwrap();
        let expected =
            r#"{"z": "<a & 'b'>", "a": [1, -2.5, 1e+16, 1e-07, 100.0, null, true], "é": {""#;
        assert_eq!(text, format!("{expected}\u{7f}\\n\": {{}}}}}}"));
        let text = render(
            "{{ messages[0]['é'] | tojson(ensure_ascii=True, indent=2) }}",
            &messages,
        )
        .unwrap();
        assert_eq!(text, "{\n  \"\\u007f\\n\": {}\n}");
        let text = render(
            "{{ messages[0].a[:2] | tojson(separators=(',', ':')) }}",
            &messages,
        )
        .unwrap();
        assert_eq!(text, "[1,-2.5]");
    }

    #[test]
    fn what_the_template_raises_is_the_message() {
        let error =
            render("{{ raise_exception('Roles must alternate') }}", &json!([])).unwrap_err();
        assert_eq!(
            (error.kind, error.message.as_str()),
            (Kind::Invalid, "Roles must alternate")
        );
    }

    #[test]
    fn a_template_that_never_ends_is_stopped() {
        let source = "{% for i in range(100000) %}{% for j in range(100000) %}{{ i * j }}{% endfor %}{% endfor %}";
        assert_eq!(render(source, &json!([])).unwrap_err().kind, Kind::Invalid);
        let source = "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}";
        assert_eq!(render(source, &json!([])).unwrap_err().kind, Kind::Invalid);
        let source = "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}";
        assert_eq!(render(source, &json!([])).unwrap_err().kind, Kind::Invalid);
    }

    #[test]
    fn generation_tags_only_mark() {
        let source = "a\n  {%- generation -%}\n  b{% endgeneration %}\nc{% generation %}\nd{%+ endgeneration +%}\ne";
        assert_eq!(render(source, &json!([])).unwrap(), "abcd\ne");
    }

    #[test]
    fn syntax_errors_are_found_when_the_template_is_loaded() {
        let error = ChatTemplate::new("{% if %}", &Map::new()).unwrap_err();
        assert_eq!(error.code, "invalid_template");
    }

    #[test]
    fn the_date_has_pythons_form() {
        let date = render("{{ strftime_now('%d %b %Y %% %Z%f') }}", &json!([])).unwrap();
        assert_eq!(date.split(' ').count(), 5, "{date}");
        assert!(date.ends_with(|c: char| c.is_ascii_digit()), "{date}");
        assert_eq!(render("{{ strftime_now('') }}", &json!([])).unwrap(), "");
    }
}
