//! The `filter` parameter of lists: `name eq web and (status ne Running or config.limits.cpu eq 2)`; values are
//! compared as text without regard to case, or as a regular expression over the whole value where it is one.

use karst_model::{Error, Result};
use regex::{Regex, RegexBuilder};
use serde_json::Value;

/// Longest filter taken, in bytes.
const LONGEST: usize = 4096;
/// Deepest nesting.
const DEEPEST: u32 = 32;

/// A parsed filter.
#[derive(Debug)]
pub struct Filter(Node);

#[derive(Debug)]
enum Node {
    All,
    Not(Box<Node>),
    And(Box<Node>, Box<Node>),
    Or(Box<Node>, Box<Node>),
    Clause { field: String, negated: bool, text: String, regex: Option<Regex> },
}

fn wrong(why: impl Into<String>) -> Error {
    Error::invalid("filter", format!("the filter is malformed: {}", why.into()))
}

impl Filter {
    /// Parses; an empty one accepts all.
    ///
    /// # Errors
    /// Invalid, with what was expected.
    pub fn parse(text: Option<&str>) -> Result<Self> {
        let Some(text) = text.map(str::trim).filter(|t| !t.is_empty()) else {
            return Ok(Self(Node::All));
        };
        if text.len() > LONGEST {
            return Err(wrong(format!("it is longer than {LONGEST} bytes")));
        }
        let tokens = tokens(text)?;
        let mut parser = Parser { tokens: &tokens, at: 0, depth: 0 };
        let node = parser.or()?;
        match parser.peek() {
            None => Ok(Self(node)),
            Some(t) => Err(wrong(format!("{t:?} where and, or, or the end is expected"))),
        }
    }

    /// Does it accept everything (so that nothing needs to be looked at)?
    pub fn accepts_all(&self) -> bool {
        matches!(self.0, Node::All)
    }

    /// Does it accept an object?
    pub fn accepts(&self, object: &Value) -> bool {
        self.0.accepts(object)
    }
}

impl Node {
    fn accepts(&self, object: &Value) -> bool {
        match self {
            Node::All => true,
            Node::Not(n) => !n.accepts(object),
            Node::And(a, b) => a.accepts(object) && b.accepts(object),
            Node::Or(a, b) => a.accepts(object) || b.accepts(object),
            Node::Clause { field, negated, text, regex } => {
                let found = lookup(object, field).map(as_text).unwrap_or_default();
                let equal =
                    found.eq_ignore_ascii_case(text) || regex.as_ref().is_some_and(|r| r.is_match(&found));
                equal != *negated
            }
        }
    }
}

/// The value of a dotted path; keys may contain dots themselves (`config.limits.memory`).
fn lookup<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    let map = value.as_object()?;
    if let Some(v) = map.get(path) {
        return Some(v);
    }
    path.match_indices('.').find_map(|(i, _)| lookup(map.get(&path[..i])?, &path[i + 1..]))
}

fn as_text(value: &Value) -> String {
    match value {
        Value::String(s) => s.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

fn tokens(text: &str) -> Result<Vec<String>> {
    let mut out = vec![];
    let mut chars = text.chars().peekable();
    while let Some(&c) = chars.peek() {
        match c {
            c if c.is_whitespace() => {
                chars.next();
            }
            '(' | ')' if c == ')' || !matches!(out.last().map(String::as_str), Some("eq" | "ne")) => {
                // After eq and ne a parenthesis begins a value: values may be regular expressions.
                out.push(c.to_string());
                chars.next();
            }
            '"' => {
                chars.next();
                let mut token = String::from("\"");
                loop {
                    match chars.next() {
                        None => return Err(wrong("a quotation is not closed")),
                        Some('"') => break,
                        Some('\\') => {
                            token.push(chars.next().ok_or_else(|| wrong("a quotation is not closed"))?)
                        }
                        Some(c) => token.push(c),
                    }
                }
                out.push(token);
            }
            _ => {
                let mut token = String::new();
                let mut open = 0;
                while let Some(&c) = chars.peek() {
                    match c {
                        c if c.is_whitespace() => break,
                        '(' => open += 1,
                        ')' if open == 0 => break,
                        ')' => open -= 1,
                        _ => {}
                    }
                    token.push(c);
                    chars.next();
                }
                out.push(token);
            }
        }
    }
    Ok(out)
}

struct Parser<'a> {
    tokens: &'a [String],
    at: usize,
    depth: u32,
}

impl Parser<'_> {
    fn peek(&self) -> Option<&str> {
        self.tokens.get(self.at).map(String::as_str)
    }

    fn next(&mut self, expected: &str) -> Result<String> {
        let token = self
            .peek()
            .map(str::to_owned)
            .ok_or_else(|| wrong(format!("it ends where {expected} is expected")))?;
        self.at += 1;
        Ok(token)
    }

    fn eat(&mut self, word: &str) -> bool {
        let found = self.peek() == Some(word);
        self.at += usize::from(found);
        found
    }

    fn or(&mut self) -> Result<Node> {
        let mut node = self.and()?;
        while self.eat("or") {
            node = Node::Or(Box::new(node), Box::new(self.and()?));
        }
        Ok(node)
    }

    fn and(&mut self) -> Result<Node> {
        let mut node = self.unary()?;
        while self.eat("and") {
            node = Node::And(Box::new(node), Box::new(self.unary()?));
        }
        Ok(node)
    }

    fn unary(&mut self) -> Result<Node> {
        self.depth += 1;
        if self.depth > DEEPEST {
            return Err(wrong("it is nested too deeply"));
        }
        let node = if self.eat("not") {
            Node::Not(Box::new(self.unary()?))
        } else if self.eat("(") {
            let inner = self.or()?;
            if !self.eat(")") {
                return Err(wrong("a parenthesis is not closed"));
            }
            inner
        } else {
            self.clause()?
        };
        self.depth -= 1;
        Ok(node)
    }

    fn clause(&mut self) -> Result<Node> {
        let field = self.next("a field")?;
        if matches!(field.as_str(), "and" | "or" | ")" | "eq" | "ne") || field.starts_with('"') {
            return Err(wrong(format!("{field:?} where a field is expected")));
        }
        let negated = match self.next("eq or ne")?.as_str() {
            "eq" => false,
            "ne" => true,
            other => return Err(wrong(format!("{other:?} where eq or ne is expected"))),
        };
        let value = self.next("a value")?;
        let (text, regex) = match value.strip_prefix('"') {
            Some(literal) => (literal.to_owned(), None),
            None => {
                let whole = format!("^(?:{value})$");
                let regex = RegexBuilder::new(&whole).case_insensitive(true).size_limit(1 << 16).build().ok();
                (value, regex)
            }
        };
        Ok(Node::Clause { field, negated, text, regex })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn accepts_what_incus_accepts() {
        let c1 = json!({"name": "c1", "status": "Running", "type": "container", "stateful": false,
            "config": {"limits.memory": "1GiB", "user.a": "x y"}});
        for (filter, expected) in [
            ("", true),
            ("name eq c1", true),
            ("name eq C1", true),
            ("name eq c2", false),
            ("name ne c2", true),
            ("status eq running and type eq container", true),
            ("status eq stopped or name eq c1", true),
            ("not status eq stopped", true),
            ("not (status eq running and name eq c1)", false),
            ("config.limits.memory eq 1GiB", true),
            ("config.user.a eq \"x y\"", true),
            ("name eq c.*", true),
            ("name eq (c1|c2)", true),
            ("name eq \"c.*\"", false),
            ("stateful eq false", true),
            ("missing.field eq x", false),
            ("name eq c9 or name eq c8 and status eq running", false),
        ] {
            assert_eq!(Filter::parse(Some(filter)).unwrap().accepts(&c1), expected, "{filter}");
        }
    }

    #[test]
    fn malformed_filters_say_why() {
        for bad in [
            "name",
            "name eq",
            "name is x",
            "and",
            "name eq x and",
            "(name eq x",
            "name eq x y",
            "name eq \"x",
            "eq eq eq",
        ] {
            let e = Filter::parse(Some(bad)).unwrap_err();
            assert_eq!(e.field.as_deref(), Some("filter"), "{bad}");
        }
        assert!(Filter::parse(Some(&"not ".repeat(1000))).is_err());
    }

    proptest! {
        #[test]
        fn never_panics(text in "\\PC{0,80}") {
            if let Ok(f) = Filter::parse(Some(&text)) { f.accepts(&json!({"name": "a"})); }
        }
    }
}
