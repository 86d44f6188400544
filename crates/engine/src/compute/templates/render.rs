//! Rendering of templates: bounded in time, depth and size, and a pure function of what it is given.

use super::parse::{Expression, Fault, Node, parse};
use karst_model::{Config, device::Devices};
use std::{borrow::Cow, cmp::Ordering};

/// Steps that a template may take.
const MAX_STEPS: usize = 20_000;

/// What a template can look up.
pub(super) struct Scope<'a> {
    /// Why it is rendered.
    pub trigger: &'static str,
    /// The file that is made.
    pub path: &'a str,
    /// `name`, `type`, `architecture`, `privileged`, `ephemeral`; also called `container`.
    pub instance: &'a Config,
    /// Configuration with the profiles' under it.
    pub config: &'a Config,
    /// Devices with the profiles' under them.
    pub devices: &'a Devices,
    /// What the rule says.
    pub properties: &'a Config,
}

/// Renders a template to at most `room` bytes.
pub(super) fn render(template: &str, scope: &Scope<'_>, room: usize) -> Result<String, Fault> {
    let nodes = parse(template)?;
    let mut run = Run { scope, out: String::new(), room, steps: 0, set: vec![] };
    run.nodes(&nodes)?;
    Ok(run.out)
}

#[derive(Debug, Clone)]
enum Value<'a> {
    Nothing,
    Flag(bool),
    Number(i64),
    Text(Cow<'a, str>),
    Map(&'a Config),
    Maps(&'a Devices),
    List(Vec<String>),
    ConfigGet,
}

impl<'a> Value<'a> {
    fn text(&self) -> Cow<'a, str> {
        match self {
            Self::Nothing | Self::ConfigGet => "".into(),
            Self::Flag(b) => if *b { "True" } else { "False" }.into(),
            Self::Number(n) => n.to_string().into(),
            Self::Text(s) => s.clone(),
            Self::Map(m) => format!("{m:?}").into(),
            Self::Maps(m) => format!("{m:?}").into(),
            Self::List(l) => format!("{l:?}").into(),
        }
    }

    fn truth(&self) -> bool {
        match self {
            Self::Nothing => false,
            Self::Flag(b) => *b,
            Self::Number(n) => *n != 0,
            Self::Text(s) => !s.is_empty(),
            Self::Map(m) => !m.is_empty(),
            Self::Maps(m) => !m.is_empty(),
            Self::List(l) => !l.is_empty(),
            Self::ConfigGet => true,
        }
    }

    fn equals(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Nothing, Self::Nothing) => true,
            (Self::Flag(a), Self::Flag(b)) => a == b,
            (Self::Number(a), Self::Number(b)) => a == b,
            (Self::Text(a), Self::Text(b)) => a == b,
            (Self::Map(a), Self::Map(b)) => a == b,
            (Self::Maps(a), Self::Maps(b)) => a == b,
            (Self::List(a), Self::List(b)) => a == b,
            _ => false,
        }
    }

    fn member(&self, key: &str) -> Self {
        match self {
            Self::Map(m) => m.get(key).map_or(Self::Nothing, |v| Self::Text(v.as_str().into())),
            Self::Maps(m) => m.get(key).map_or(Self::Nothing, Self::Map),
            Self::List(l) => {
                let found = key.parse::<usize>().ok().and_then(|n| l.get(n));
                found.map_or(Self::Nothing, |v| Self::Text(v.clone().into()))
            }
            _ => Self::Nothing,
        }
    }

    /// Bytes that handling it copies.
    fn size(&self) -> usize {
        match self {
            Self::Text(s) => s.len(),
            Self::List(l) => l.iter().map(|s| s.len() + 32).sum(),
            _ => 0,
        }
    }

    fn length(&self) -> usize {
        match self {
            Self::Text(s) => s.chars().count(),
            Self::Map(m) => m.len(),
            Self::Maps(m) => m.len(),
            Self::List(l) => l.len(),
            _ => 0,
        }
    }

    fn contains(&self, what: &Self) -> bool {
        let what = what.text();
        match self {
            Self::Text(s) => s.contains(&*what),
            Self::Map(m) => m.contains_key(&*what),
            Self::Maps(m) => m.contains_key(&*what),
            Self::List(l) => l.iter().any(|e| *e == *what),
            _ => false,
        }
    }
}

struct Run<'a, 's> {
    scope: &'s Scope<'a>,
    out: String,
    room: usize,
    steps: usize,
    /// Variables, the innermost last.
    set: Vec<(String, Value<'a>)>,
}

impl<'a> Run<'a, '_> {
    fn step(&mut self, line: usize) -> Result<(), Fault> {
        self.steps += 1;
        if self.steps > MAX_STEPS {
            return Err(Fault { line, what: "it takes too long".into() });
        }
        Ok(())
    }

    /// Handling a long text takes longer.
    fn handle(&mut self, line: usize, bytes: usize) -> Result<(), Fault> {
        self.steps += bytes / 64;
        self.step(line)
    }

    fn write(&mut self, line: usize, text: &str) -> Result<(), Fault> {
        if text.len() > self.room - self.out.len() {
            return Err(Fault { line, what: "what it makes is too large".into() });
        }
        self.out.push_str(text);
        Ok(())
    }

    fn nodes(&mut self, nodes: &[Node]) -> Result<(), Fault> {
        let mut at = 1;
        for node in nodes {
            match node {
                Node::Text(text) => {
                    self.step(at)?;
                    self.write(at, text)?;
                }
                Node::Output(line, e) => {
                    at = *line;
                    let text = self.value(at, e)?.text();
                    self.write(at, &text)?;
                }
                Node::Set(line, name, e) => {
                    let value = self.value(*line, e)?;
                    self.set.push((name.clone(), value));
                }
                Node::If(line, arms, otherwise) => {
                    at = *line;
                    let mut chosen = otherwise;
                    for (condition, body) in arms {
                        if self.value(at, condition)?.truth() {
                            chosen = body;
                            break;
                        }
                    }
                    self.nodes(chosen)?;
                }
                Node::For(line, names, e, body, empty) => {
                    at = *line;
                    let rounds: Vec<(Value<'a>, Value<'a>)> = match self.value(at, e)? {
                        Value::Map(m) => m.iter().map(|(k, v)| (text(k), text(v))).collect(),
                        Value::Maps(m) => m.iter().map(|(k, v)| (text(k), Value::Map(v))).collect(),
                        Value::List(l) => {
                            l.into_iter().map(|v| (Value::Text(v.into()), Value::Nothing)).collect()
                        }
                        _ => vec![],
                    };
                    if rounds.is_empty() {
                        self.nodes(empty)?;
                    }
                    for (first, second) in rounds {
                        self.step(at)?;
                        let before = self.set.len();
                        self.set.extend(names.iter().cloned().zip([first, second]));
                        self.nodes(body)?;
                        self.set.truncate(before);
                    }
                }
            }
        }
        Ok(())
    }

    fn value(&mut self, line: usize, e: &Expression) -> Result<Value<'a>, Fault> {
        self.step(line)?;
        let fault = |what: String| Fault { line, what };
        Ok(match e {
            Expression::Nothing => Value::Nothing,
            Expression::Flag(b) => Value::Flag(*b),
            Expression::Number(n) => Value::Number(*n),
            Expression::Text(s) => Value::Text(s.clone().into()),
            Expression::Name(name) => {
                let value = self.name(name);
                self.handle(line, value.size())?;
                value
            }
            Expression::Member(of, key) => {
                let key = self.value(line, key)?.text();
                self.value(line, of)?.member(&key)
            }
            Expression::Call(what, arguments) => {
                if !matches!(self.value(line, what)?, Value::ConfigGet) {
                    return Err(fault("config_get is the only thing that can be called here".into()));
                }
                let [key, default @ ..] = arguments.as_slice() else {
                    return Err(fault("config_get needs a key".into()));
                };
                if default.len() > 1 {
                    return Err(fault("config_get takes a key and a default".into()));
                }
                let key = self.value(line, key)?.text();
                match (self.scope.config.get(&*key), default) {
                    (Some(found), _) => text(found.trim_end_matches(['\r', '\n'])),
                    (None, [default]) => self.value(line, default)?,
                    (None, _) => Value::Nothing,
                }
            }
            Expression::Filter(of, name, argument) => {
                let value = self.value(line, of)?;
                let argument = match argument {
                    Some(argument) => self.value(line, argument)?,
                    None => Value::Nothing,
                };
                self.handle(line, value.size() + argument.size())?;
                let joined = match (&value, name.as_str()) {
                    (Value::List(l), "join") => value.size() + l.len() * argument.size(),
                    _ => 0,
                };
                self.handle(line, joined)?;
                filter(name, value, argument)
            }
            Expression::Not(e) => Value::Flag(!self.value(line, e)?.truth()),
            Expression::Both(a, b) => {
                Value::Flag(self.value(line, a)?.truth() && self.value(line, b)?.truth())
            }
            Expression::Either(a, b) => {
                Value::Flag(self.value(line, a)?.truth() || self.value(line, b)?.truth())
            }
            Expression::Compare(a, sign, b) => {
                let (a, b) = (self.value(line, a)?, self.value(line, b)?);
                let order = || match (&a, &b) {
                    (Value::Number(a), Value::Number(b)) => a.cmp(b),
                    _ => a.text().cmp(&b.text()),
                };
                Value::Flag(match *sign {
                    "==" => a.equals(&b),
                    "!=" => !a.equals(&b),
                    "in" => b.contains(&a),
                    "<" => order() == Ordering::Less,
                    "<=" => order() != Ordering::Greater,
                    ">" => order() == Ordering::Greater,
                    _ => order() != Ordering::Less,
                })
            }
        })
    }

    fn name(&self, name: &str) -> Value<'a> {
        if let Some((_, value)) = self.set.iter().rev().find(|(n, _)| n == name) {
            return value.clone();
        }
        match name {
            "trigger" => text(self.scope.trigger),
            "path" => text(self.scope.path),
            "container" | "instance" => Value::Map(self.scope.instance),
            "config" => Value::Map(self.scope.config),
            "devices" => Value::Maps(self.scope.devices),
            "properties" => Value::Map(self.scope.properties),
            "config_get" => Value::ConfigGet,
            _ => Value::Nothing,
        }
    }
}

fn text(s: &str) -> Value<'_> {
    Value::Text(s.into())
}

fn filter<'a>(name: &str, value: Value<'a>, argument: Value<'a>) -> Value<'a> {
    let own = |s: String| Value::Text(s.into());
    let capital = |s: &str| {
        let mut chars = s.chars();
        chars.next().map(|c| c.to_uppercase().chain(chars).collect::<String>()).unwrap_or_default()
    };
    match name {
        "default" if !value.truth() => argument,
        "default_if_none" if matches!(value, Value::Nothing) => argument,
        "lower" => own(value.text().to_lowercase()),
        "upper" => own(value.text().to_uppercase()),
        "capfirst" => own(capital(&value.text())),
        "title" => own(value.text().split(' ').map(capital).collect::<Vec<_>>().join(" ")),
        "cut" => own(value.text().replace(&*argument.text(), "")),
        "length" => Value::Number(value.length() as i64),
        "split" => Value::List(value.text().split(&*argument.text()).map(str::to_owned).collect()),
        "join" => match value {
            Value::List(l) => own(l.join(&argument.text())),
            other => other,
        },
        "first" | "last" => match value {
            Value::List(mut l) => {
                let found = if name == "first" { l.drain(..).next() } else { l.pop() };
                found.map_or(Value::Nothing, own)
            }
            other => {
                let text = other.text();
                let found = if name == "first" { text.chars().next() } else { text.chars().last() };
                own(found.map(String::from).unwrap_or_default())
            }
        },
        _ => value,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn config(pairs: &[(&str, &str)]) -> Config {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    fn rendered(template: &str) -> Result<String, Fault> {
        let instance = config(&[("name", "c1"), ("type", "container")]);
        let settings = config(&[("user.user-data", "#cloud-config\n\n"), ("user.a", "b")]);
        let devices = Devices::from([("eth0".to_owned(), config(&[("type", "nic")]))]);
        let properties = config(&[("default", "d"), ("list", "a,b")]);
        let scope = Scope {
            trigger: "create",
            path: "/etc/x",
            instance: &instance,
            config: &settings,
            devices: &devices,
            properties: &properties,
        };
        render(template, &scope, 4096)
    }

    #[test]
    fn what_images_bring_is_rendered_as_incus_does() {
        for (template, made) in [
            ("", ""),
            ("{{ container.name }}\n", "c1\n"),
            ("127.0.1.1\t{{instance.name}}", "127.0.1.1\tc1"),
            (r#"{{ config_get("user.user-data", properties.default) }}"#, "#cloud-config"),
            (r#"{{ config_get("user.vendor-data", properties.default) }}"#, "d"),
            (r#"{{ config_get("user.nothing") }}|"#, "|"),
            (
                r#"{% if config_get("user.network-config", "") == "" %}version: 1{% else %}{{ config_get("user.network-config", "") }}{% endif %}"#,
                "version: 1",
            ),
            (
                r#"{% if config["user.a"] == "x" %}1{% elif trigger == "create" and not path %}2{% else %}3{% endif %}"#,
                "3",
            ),
            ("{% for k, v in config %}{{ k }}={{ v|length }};{% endfor %}", "user.a=1;user.user-data=15;"),
            ("{% for k, d in devices %}{{ k }}:{{ d.type }}{% endfor %}", "eth0:nic"),
            (r#"{% for x in properties.list|split:"," %}{{ x|upper }}{% empty %}none{% endfor %}"#, "AB"),
            ("{% for x in nothing %}x{% empty %}none{% endfor %}", "none"),
            (
                r#"a {%- set x = "{{" -%} b{{ x }}{# {{ nothing"s #}{% comment %}{{ x }}{% endcomment %}"#,
                "ab{{",
            ),
            (r#"{{ missing|default:"x" }}{{ properties.missing.deeper }}{{ "q\"\\" }}"#, "xq\"\\"),
            ("{% autoescape off %}{{ '<&>' }}{% endautoescape %} { } {x", "<&> { } {x"),
            (r#"{{ "eth0" in devices }}{{ 2 < 10 }}{{ ("a" || "") && !false }}"#, "TrueTrueTrue"),
        ] {
            assert_eq!(rendered(template).as_deref(), Ok(made), "{template}");
        }
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        for (template, line, says) in [
            ("\n{{ x", 2, "not closed"),
            ("\n\n{% if x %}", 3, "endif"),
            ("{% include \"/etc/shadow\" %}", 1, "include"),
            ("{{ x|shell }}", 1, "filter"),
            ("{{ x|default }}", 1, "argument"),
            ("{{ x| }}", 1, "filter"),
            ("{{ x y }}", 1, "more than"),
            ("{{ }}", 1, "missing"),
            ("{{ name(1) }}", 1, "config_get"),
            ("{{ config_get() }}", 1, "key"),
            ("{% for x %}{% endfor %}", 1, "for NAME"),
            ("{% set 1 = 2 %}", 1, "set NAME"),
            ("{{ 99999999999999999999 }}", 1, "too large"),
            ("{{ a § b }}", 1, "no meaning"),
            ("{% endif %}", 1, "endif"),
        ] {
            let fault = rendered(template).unwrap_err();
            assert!(fault.line == line && fault.what.contains(says), "{template}: {fault:?}");
        }
        let deep = format!("{}x{}", "(".repeat(100), ")".repeat(100));
        assert!(rendered(&format!("{{{{ {deep} }}}}")).unwrap_err().what.contains("deep"));
        assert!(rendered(&"{% if 1 %}".repeat(5000)).unwrap_err().what.contains("deep"));
        assert!(rendered(&"x".repeat(5000)).unwrap_err().what.contains("too large"));
        let many = "{% for a, b in config %}".repeat(20) + &"{% endfor %}".repeat(20);
        assert!(rendered(&many).unwrap_err().what.contains("too long"));
        let joined = r#"{% set x = config["user.user-data"]|split:""|join:config["user.user-data"] %}"#
            .to_owned()
            + &r#"{% set x = x|split:""|join:x %}"#.repeat(20);
        assert!(rendered(&joined).unwrap_err().what.contains("too long"));
        let long = format!("{{{{ x{} }}}}", ".x".repeat(5000));
        assert!(rendered(&long).unwrap_err().what.contains("more than 256"));
        let doubled = format!("{{% set x = \"{}\" %}}", "x".repeat(1000))
            + &"{% for k, v in config %}{{ x }}{% endfor %}".repeat(10);
        assert!(rendered(&doubled).unwrap_err().what.contains("too large"));
    }

    proptest! {
        #[test]
        fn nothing_makes_it_fall(template in r#"(\{\{|\}\}|\{%|%\}|\{#|#\}|-| if | endif | for | in | set |config|x|"|\\|\||:|\(|\)|\[|\]|\.|é|\n| |=|default){0,60}"#) {
            let _ = rendered(&template);
        }
    }
}
