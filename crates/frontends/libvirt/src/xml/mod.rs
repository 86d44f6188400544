//! XML as libvirt writes it: two spaces a level, attributes in single quotes. Scripts match these lines, so the form counts.

pub mod backup;
pub mod capabilities;
pub mod checkpoint;
pub mod domain;
pub mod encryption;
pub mod machine;
pub mod network;
pub mod nodedev;
pub mod nwfilter;
pub mod read;
pub mod secret;
pub mod snapshot;
pub mod storage;

use std::{borrow::Cow, fmt::Write};

/// An element; built, then written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Element {
    name: Cow<'static, str>,
    attributes: Vec<(Cow<'static, str>, String)>,
    content: Content,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Content {
    Elements(Vec<Element>),
    Text(String),
}

impl Element {
    /// An element without anything in it.
    pub fn new(name: impl Into<Cow<'static, str>>) -> Self {
        Self { name: name.into(), attributes: vec![], content: Content::Elements(vec![]) }
    }

    /// An element that holds text.
    pub fn text(name: impl Into<Cow<'static, str>>, text: impl ToString) -> Self {
        Self { content: Content::Text(text.to_string()), ..Self::new(name) }
    }

    /// With an attribute.
    pub fn with(mut self, name: impl Into<Cow<'static, str>>, value: impl ToString) -> Self {
        self.attributes.push((name.into(), value.to_string()));
        self
    }

    /// With an attribute when there is a value.
    pub fn with_some(self, name: impl Into<Cow<'static, str>>, value: Option<impl ToString>) -> Self {
        match value {
            Some(value) => self.with(name, value),
            None => self,
        }
    }

    /// With an element inside.
    pub fn child(mut self, child: Element) -> Self {
        self.push(child);
        self
    }

    /// With elements inside.
    pub fn children(mut self, all: impl IntoIterator<Item = Element>) -> Self {
        all.into_iter().for_each(|e| self.push(e));
        self
    }

    /// Adds an element inside.
    pub fn push(&mut self, child: Element) {
        match &mut self.content {
            Content::Elements(all) => all.push(child),
            // Mixed content occurs nowhere in libvirt's documents.
            Content::Text(_) => self.content = Content::Elements(vec![child]),
        }
    }

    /// Its name, with the prefix of a namespace.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The value of an attribute.
    pub fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    /// Names and values of its attributes.
    pub fn attributes(&self) -> impl Iterator<Item = (&str, &str)> {
        self.attributes.iter().map(|(n, v)| (&**n, v.as_str()))
    }

    /// Sets an attribute in its place, or at the end.
    pub fn set(&mut self, name: impl Into<Cow<'static, str>>, value: impl ToString) {
        let (name, value) = (name.into(), value.to_string());
        match self.attributes.iter_mut().find(|(n, _)| *n == name) {
            Some((_, old)) => *old = value,
            None => self.attributes.push((name, value)),
        }
    }

    /// Takes an attribute away.
    pub fn unset(&mut self, name: &str) {
        self.attributes.retain(|(n, _)| n != name);
    }

    /// The elements in it.
    pub fn elements(&self) -> &[Element] {
        match &self.content {
            Content::Elements(all) => all,
            Content::Text(_) => &[],
        }
    }

    /// The elements in it, to be changed.
    pub fn elements_mut(&mut self) -> &mut Vec<Element> {
        if let Content::Text(_) = self.content {
            self.content = Content::Elements(vec![]);
        }
        match &mut self.content {
            Content::Elements(all) => all,
            // Made so above.
            Content::Text(_) => unreachable!("the content was text"),
        }
    }

    /// The first element of a name in it.
    pub fn find(&self, name: &str) -> Option<&Element> {
        self.elements().iter().find(|e| e.name == name)
    }

    /// All elements of a name in it.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Element> {
        self.elements().iter().filter(move |e| e.name == name)
    }

    /// Its text; nothing when it holds elements.
    pub fn body(&self) -> &str {
        match &self.content {
            Content::Text(text) => text,
            Content::Elements(_) => "",
        }
    }

    /// With another name.
    pub fn renamed(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.name = name.into();
        self
    }

    /// Adds an element inside, if there is one.
    pub fn push_some(&mut self, child: Option<Element>) {
        child.into_iter().for_each(|c| self.push(c));
    }

    /// The document, with a line break at its end.
    pub fn document(&self) -> String {
        let mut out = String::new();
        self.write(&mut out, 0);
        out
    }

    fn write(&self, out: &mut String, level: usize) {
        let names = || self.attributes.iter().map(|(n, _)| &**n).chain([&*self.name]);
        debug_assert!(names().all(is_name), "what is read, and what is written, has names: {self:?}");
        // Writing to a string does not fail.
        let _ = write!(out, "{:level$}<{}", "", self.name, level = 2 * level);
        for (name, value) in &self.attributes {
            let _ = write!(out, " {name}='{}'", escape(value));
        }
        match &self.content {
            Content::Elements(all) if all.is_empty() => out.push_str("/>\n"),
            Content::Elements(all) => {
                out.push_str(">\n");
                all.iter().for_each(|e| e.write(out, level + 1));
                let _ = writeln!(out, "{:level$}</{}>", "", self.name, level = 2 * level);
            }
            Content::Text(text) => {
                let _ = writeln!(out, ">{}</{}>", escape(text), self.name);
            }
        }
    }
}

/// Can it be the name of an element or attribute, with its prefix?
pub fn is_name(text: &str) -> bool {
    let mut all = text.chars();
    let first = all.next().is_some_and(|c| c.is_alphabetic() || matches!(c, '_' | ':'));
    first && all.all(|c| c.is_alphanumeric() || matches!(c, '_' | ':' | '-' | '.' | '\u{b7}'))
}

/// Can it be a prefix, or what follows one (`NCName`)? Those that begin with `xml` are XML's own.
pub fn is_prefix(text: &str) -> bool {
    let own = text.get(..3).is_some_and(|b| b.eq_ignore_ascii_case("xml"));
    is_name(text) && !text.contains(':') && !own
}

/// Escapes text; what XML 1.0 cannot hold is left out, as libvirt does.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&apos;"),
            '\n' | '\t' | '\r' => out.push(c),
            c if c < ' ' || c == '\u{fffe}' || c == '\u{ffff}' => {}
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_what_would_break_out_of_a_document() {
        for good in ["a", "_a", "app:a", "a-1.b", "ä"] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", "1", "-a", "a b", "a>", "a><injected", "a='x'", "a/", "a\n"] {
            assert!(!is_name(bad) && !is_prefix(bad), "{bad}");
        }
        assert!(is_prefix("app") && !is_prefix("app:a") && !is_prefix("xml") && !is_prefix("XMLns"));
    }

    #[test]
    fn documents_look_like_libvirts() {
        let e = Element::new("domain")
            .with("type", "qemu")
            .with_some("id", Some(3))
            .with_some("none", None::<u32>)
            .child(Element::text("name", "a<b>&'\"\u{1}"))
            .child(Element::new("features").child(Element::new("acpi")));
        let text = "<domain type='qemu' id='3'>\n  <name>a&lt;b&gt;&amp;&apos;&quot;</name>\n  <features>\n    <acpi/>\n  </features>\n</domain>\n";
        assert_eq!(e.document(), text);
    }
}
