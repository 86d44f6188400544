//! Reading XML into elements. What a client sends is foreign: a declaration of a document type and entities of its own are
//! refused, and size and depth have bounds.

use super::{Element, is_name};
use crate::error::{Code, Part, VirError};
use quick_xml::{
    XmlVersion,
    escape::resolve_predefined_entity,
    events::{BytesStart, Event},
    reader::Reader,
};

/// Bytes of a document.
pub const LARGEST: usize = 256 << 10;
/// Elements within elements.
const DEEPEST: usize = 64;

fn wrong(text: impl Into<String>) -> VirError {
    VirError::new(Code::XmlError, Part::Xml, text)
}

/// An element that is being read.
struct Open {
    element: Element,
    text: String,
}

impl Open {
    fn close(self) -> Result<Element, VirError> {
        let Self { element, text } = self;
        match (element.elements().is_empty(), text.trim().is_empty()) {
            (_, true) => Ok(element),
            (true, false) => {
                let mut whole = Element::text(element.name.clone(), text);
                whole.attributes = element.attributes;
                Ok(whole)
            }
            (false, false) => Err(wrong(format!("there is text beside elements in <{}>", element.name))),
        }
    }
}

/// The element that a document consists of. White space between elements says nothing.
///
/// # Errors
/// XML error, for what is not well-formed, too large, too deep, or needs a document type.
pub fn document(text: &str) -> Result<Element, VirError> {
    if text.len() > LARGEST {
        return Err(wrong(format!("the document is larger than {} KiB", LARGEST >> 10)));
    }
    if let Some(c) = text.chars().find(|c| !allowed(*c)) {
        return Err(wrong(format!("the document holds the character {:#x}", u32::from(c))));
    }
    let mut reader = Reader::from_str(text);
    reader.config_mut().enable_all_checks(true);
    let mut open: Vec<Open> = vec![];
    let mut root = None;
    loop {
        let event =
            reader.read_event().map_err(|e| wrong(format!("{e} (at byte {})", reader.error_position())))?;
        let ended = match event {
            Event::Start(start) => {
                if open.len() >= DEEPEST {
                    return Err(wrong(format!("more than {DEEPEST} elements lie within each other")));
                }
                open.push(Open { element: begin(&start)?, text: String::new() });
                None
            }
            Event::Empty(start) => Some(begin(&start)?),
            Event::End(_) => open.pop().map(Open::close).transpose()?,
            Event::Text(text) => {
                say(&mut open, &text.xml10_content())?;
                None
            }
            Event::CData(data) => {
                say(&mut open, &data.xml10_content())?;
                None
            }
            Event::GeneralRef(reference) => {
                let c = reference.resolve_char_ref().map_err(|e| wrong(e.to_string()))?;
                let name = reference.xml10_content();
                let text = match c {
                    Some(c) if allowed(c) => c.to_string(),
                    Some(c) => {
                        return Err(wrong(format!("the document holds the character {:#x}", u32::from(c))));
                    }
                    None => resolve_predefined_entity(&name)
                        .ok_or_else(|| wrong(format!("the entity &{name}; is not known")))?
                        .to_owned(),
                };
                say(&mut open, &text)?;
                None
            }
            Event::DocType(_) => return Err(wrong("declarations of a document type are not taken")),
            Event::Comment(_) | Event::Decl(_) | Event::PI(_) => None,
            Event::Eof => break,
        };
        let Some(element) = ended else { continue };
        match open.last_mut() {
            Some(parent) => parent.element.push(element),
            None if root.is_none() => root = Some(element),
            None => return Err(wrong("there is more than one element at the top")),
        }
    }
    match (root, open.is_empty()) {
        (Some(root), true) => Ok(root),
        _ => Err(wrong("the document ends before its element does")),
    }
}

/// A character of XML 1.0.
fn allowed(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r' | ' '..='\u{fffd}' | '\u{10000}'..)
}

fn say(open: &mut [Open], text: &str) -> Result<(), VirError> {
    match open.last_mut() {
        Some(inner) => inner.text.push_str(text),
        None if text.trim().is_empty() => {}
        None => return Err(wrong("there is text outside of the document's element")),
    }
    Ok(())
}

fn begin(start: &BytesStart<'_>) -> Result<Element, VirError> {
    let name: String = start.name().as_ref().to_owned();
    if !is_name(&name) {
        return Err(wrong(format!("{name:?} is no name of an element")));
    }
    let mut element = Element::new(name);
    for attribute in start.attributes() {
        let attribute = attribute.map_err(|e| wrong(e.to_string()))?;
        let value = attribute.normalized_value(XmlVersion::Implicit1_0).map_err(|e| wrong(e.to_string()))?;
        if let Some(c) = value.chars().find(|c| !allowed(*c)) {
            return Err(wrong(format!("the document holds the character {:#x}", u32::from(c))));
        }
        let name: String = attribute.key.as_ref().to_owned();
        if !is_name(&name) {
            return Err(wrong(format!("{name:?} is no name of an attribute")));
        }
        element = element.with(name, value);
    }
    Ok(element)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_document_is_read_as_it_would_be_written() {
        let text = "<?xml version='1.0'?><!-- c -->\n<a x='1 &amp; &#50;'>\n <b/> <c>t &lt; <![CDATA[<u>]]></c>\n</a>\n";
        let a = document(text).unwrap();
        assert_eq!(a.attribute("x"), Some("1 & 2"));
        assert_eq!(a.elements().len(), 2);
        assert_eq!(a.find("c").unwrap().body(), "t < <u>");
        assert_eq!(document(&a.document()).unwrap(), a);
    }

    #[test]
    fn what_is_not_well_formed_or_not_safe_is_refused() {
        let deep = "<a>".repeat(DEEPEST + 1) + &"</a>".repeat(DEEPEST + 1);
        let large = format!("<a>{}</a>", "x".repeat(LARGEST));
        for bad in [
            "",
            "text",
            "<a>",
            "<a></b>",
            "<a/><b/>",
            "<a x='1' x='2'/>",
            "<a>&x;</a>",
            "<a>&#0;</a>",
            "<a x='&#1;'/>",
            "<a>\u{1}</a>",
            "<a>text<b/></a>",
            "<!DOCTYPE a [<!ENTITY x SYSTEM '/etc/passwd'>]><a>&x;</a>",
            "<a x=1/>",
            "<a x<y='1'/>",
            "<1/>",
            &deep,
            &large,
        ] {
            let e = document(bad).unwrap_err();
            assert_eq!(e.code, Code::XmlError, "{}", bad.chars().take(40).collect::<String>());
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_a_panic(text in ".{0,200}") {
            let _ = document(&text);
        }

        #[test]
        fn elements_survive(name in "[a-z][a-z0-9:]{0,8}", value in "[^\u{0}-\u{1f}]{0,20}", text in "[!-~]{1,20}") {
            let inner = Element::text("t", text);
            let e = Element::new(name).with("v", value.replace(['\u{fffe}', '\u{ffff}'], "")).child(inner);
            prop_assert_eq!(document(&e.document()).unwrap(), e);
        }
    }
}
