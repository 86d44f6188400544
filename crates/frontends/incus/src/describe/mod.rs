//! The API described: for each row of the table that is served, which parameters it reads, which body it takes, what it
//! answers. [`crate::openapi`] makes the document of it.
//!
//! It decides nothing: handlers read and write as they do. It is written by hand, and not derived from types, because there are
//! no types to derive it from: bodies are read field by field, so that what is wrong is named, and views serialize in place. That
//! both agree is what tests see to: of each request of every test what was read must stand here as what it was read
//! ([`crate::observe`]), each answer must be what stands here, and what stands here must be read by its handler.

pub mod answers;
mod guests;
pub mod hosts;
pub mod parameters;
pub mod requests;
pub mod rows;

use crate::observe::FieldKind;
use hyper::Method;

/// What a value is.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// A text.
    Text,
    /// A time (RFC 3339). Never is Go's zero time.
    Time,
    /// One of these texts.
    Word(&'static [&'static str]),
    /// `true` or `false`.
    Flag,
    /// A whole number.
    Integer,
    /// A number.
    Number,
    /// Null alone.
    Null,
    /// Anything.
    Any,
    /// A list of texts.
    Texts,
    /// Texts by key.
    Config,
    /// Texts by key by name.
    Devices,
    /// A list.
    List(&'static Kind),
    /// Values by name.
    Map(&'static Kind),
    /// An object with these fields.
    Object(&'static Shape),
    /// The value, or null.
    Nullable(&'static Kind),
    /// One of these.
    Either(&'static [Kind]),
    /// Of an answer: it may be absent.
    Maybe(&'static Kind),
    /// Of a request: it must be there.
    Must(&'static Kind),
}

/// Fields by name.
#[derive(Debug)]
pub struct Shape {
    /// Its name in the document.
    pub name: &'static str,
    /// What it is.
    pub text: &'static str,
    /// Its fields. Those of an answer are always there, those of a request may be left out, unless they say otherwise.
    pub fields: &'static [(&'static str, Kind)],
    /// Of a request: fields that are taken without meaning, because clients send back what they were shown.
    pub carried: &'static [&'static str],
}

/// Shapes as they are written in this module: what it is, its constant, its name, its fields.
macro_rules! shapes {
    ($(
        #[doc = $text:literal]
        $constant:ident $name:literal { $( $field:literal : $kind:expr ),* $(,)? }
        $( carries [ $( $carried:literal ),* $(,)? ] )?
    )+) => {
        $(
            #[doc = $text]
            pub static $constant: Shape = Shape {
                name: $name,
                text: $text,
                fields: &[ $( ($field, $kind) ),* ],
                carried: &[ $( $( $carried ),* )? ],
            };
        )+
    };
}
pub(crate) use shapes;

/// A parameter beside the path.
#[derive(Debug, Clone, Copy)]
pub struct Parameter {
    /// `query` or `header`.
    pub place: &'static str,
    /// Name.
    pub name: &'static str,
    /// What its value is.
    pub kind: Kind,
    /// What it does.
    pub text: &'static str,
}

/// What a request carries.
#[derive(Debug, Clone, Copy)]
pub enum Body {
    /// Nothing.
    Nothing,
    /// Nothing, or an object without fields.
    Blank,
    /// JSON.
    Json(&'static Shape),
    /// Content.
    Content(&'static [&'static str]),
    /// JSON of one of these, or content.
    Both(&'static [&'static Shape], &'static [&'static str]),
}

/// What comes back when all is well.
#[derive(Debug, Clone, Copy)]
pub enum Answer {
    /// 200 with metadata.
    Sync(Kind),
    /// 200 with paths, or with whole objects where there is recursion.
    Listed(&'static Shape),
    /// 200 without anything to say.
    Done,
    /// 201: where it is stands in `Location`.
    Created,
    /// 202: an operation does it.
    Operation,
    /// 200 with content.
    Content(&'static str),
    /// 200 without a body: the headers are the answer.
    Head,
    /// 101: the connection speaks something else from there on.
    Upgrade(&'static str),
}

/// A row, or those of several methods that are alike.
#[derive(Debug)]
pub struct Described {
    /// Methods, with spaces between.
    pub methods: &'static str,
    /// Path, as in the table.
    pub path: &'static str,
    /// What it does.
    pub text: &'static str,
    /// Parameters beside those of the path.
    pub parameters: &'static [Parameter],
    /// Body.
    pub body: Body,
    /// Answers.
    pub answers: &'static [Answer],
}

/// The description of a row that is served.
pub fn of(method: &Method, path: &str) -> Option<&'static Described> {
    rows::all().find(|d| d.path == path && d.methods.split(' ').any(|m| m == method.as_str()))
}

impl Kind {
    /// The same without what is said about its presence.
    pub fn bare(&self) -> &Kind {
        match self {
            Kind::Maybe(kind) | Kind::Must(kind) => kind.bare(),
            kind => kind,
        }
    }

    /// Is it read as this?
    fn is_read_as(&self, kind: FieldKind) -> bool {
        let wanted = match self.bare() {
            Kind::Text | Kind::Time | Kind::Word(_) => FieldKind::Text,
            Kind::Flag => FieldKind::Flag,
            Kind::Integer => FieldKind::Integer,
            Kind::Texts => FieldKind::Texts,
            Kind::Object(_) => FieldKind::Object,
            Kind::Config => FieldKind::Config,
            Kind::Devices => FieldKind::Devices,
            _ => return kind == FieldKind::Any,
        };
        // What is taken as it is may be anything.
        kind == wanted || kind == FieldKind::Any
    }
}

/// A place in a body: its path in the description, and what stands there; `None` for what has no meaning.
pub type Place = (String, Option<&'static Kind>);

impl Shape {
    /// What is described at this path of a body, as in `source.type`, `ingress[3].action` and `templates./etc/x.when`: in the
    /// description these are `source.type`, `ingress[].action` and `templates.*.when`.
    pub fn at(&self, path: &str) -> Option<Place> {
        let field = self.fields.iter().find_map(|(name, kind)| {
            let (rest, found) = below(kind, path.strip_prefix(*name)?)?;
            Some((format!("{name}{rest}"), found))
        });
        field.or_else(|| self.carried.contains(&path).then(|| (path.to_owned(), None)))
    }

    /// All places in it and in what lies below.
    pub fn places(&self) -> Vec<Place> {
        let mut all: Vec<Place> = self.carried.iter().map(|name| ((*name).to_owned(), None)).collect();
        for (name, kind) in self.fields {
            all.push(((*name).to_owned(), Some(kind)));
            let (between, shape) = match kind.bare() {
                Kind::Object(shape) => (".", *shape),
                Kind::List(Kind::Object(shape)) => ("[].", *shape),
                Kind::Map(Kind::Object(shape)) => (".*.", *shape),
                _ => continue,
            };
            all.extend(
                shape.places().into_iter().map(|(path, kind)| (format!("{name}{between}{path}"), kind)),
            );
        }
        all
    }
}

/// What lies at `rest` of a path below a value of this kind.
fn below(kind: &'static Kind, rest: &str) -> Option<Place> {
    if rest.is_empty() {
        return Some((String::new(), Some(kind)));
    }
    let behind = |start: &str, (rest, found): Place| (format!("{start}{rest}"), found);
    match kind.bare() {
        Kind::Object(shape) => shape.at(rest.strip_prefix('.')?).map(|place| behind(".", place)),
        Kind::List(item) => {
            let (number, rest) = rest.strip_prefix('[')?.split_once(']')?;
            number.parse::<usize>().ok()?;
            below(item, rest).map(|place| behind("[]", place))
        }
        Kind::Map(item) => {
            // Its names may have dots in them.
            let rest = rest.strip_prefix('.')?;
            let mut ends = rest.match_indices('.').map(|(at, _)| at).chain([rest.len()]);
            ends.find_map(|at| below(item, &rest[at..])).map(|place| behind(".*", place))
        }
        _ => None,
    }
}

impl Described {
    /// Shapes of its body where that is JSON.
    pub fn shapes(&self) -> Vec<&'static Shape> {
        match self.body {
            Body::Json(shape) => vec![shape],
            Body::Both(shapes, _) => shapes.to_vec(),
            Body::Nothing | Body::Blank | Body::Content(_) => vec![],
        }
    }

    /// The place that this path means when it is read as `kind`.
    pub fn reads(&self, path: &str, kind: FieldKind) -> Option<String> {
        let found = self.shapes().into_iter().filter_map(|shape| shape.at(path));
        found
            .filter(|(_, described)| described.is_some_and(|d| d.is_read_as(kind)))
            .map(|(path, _)| path)
            .next()
    }

    /// The place that this path means when it is taken without meaning. What counts in one case may be without meaning in
    /// another.
    pub fn carries(&self, path: &str) -> Option<String> {
        self.shapes().into_iter().find_map(|shape| shape.at(path)).map(|(path, _)| path)
    }

    /// Has it such a parameter?
    pub fn parameter(&self, place: &str, name: &str) -> bool {
        self.parameters.iter().any(|p| p.place == place && p.name.eq_ignore_ascii_case(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routes::{State, TABLE};
    use std::collections::BTreeSet;

    #[test]
    fn each_row_that_is_served_is_described_once() {
        let mut described = BTreeSet::new();
        for d in rows::all() {
            for method in d.methods.split(' ') {
                assert!(
                    described.insert((method.to_owned(), d.path.to_owned())),
                    "{method} {} twice",
                    d.path
                );
            }
            let mut names = BTreeSet::new();
            assert!(
                d.parameters.iter().all(|p| names.insert((p.place, p.name))),
                "{}: a parameter twice",
                d.path
            );
            assert!(!d.answers.is_empty() && !d.text.is_empty(), "{}", d.path);
        }
        let served: BTreeSet<_> = TABLE
            .iter()
            .filter(|r| matches!(r.state, State::Done(..)))
            .map(|r| (r.method.to_string(), r.path.to_owned()))
            .collect();
        let missing: Vec<_> = served.difference(&described).collect();
        let beyond: Vec<_> = described.difference(&served).collect();
        assert!(missing.is_empty() && beyond.is_empty(), "missing {missing:#?}, beyond {beyond:#?}");
    }

    shapes! {
        /// A rule.
        RULE "Rule" { "when": Kind::Texts }

        /// Everything.
        WHOLE "Whole" {
            "rule": Kind::Object(&RULE), "rules": Kind::List(&Kind::Object(&RULE)),
            "by_name": Kind::Map(&Kind::Object(&RULE)), "config": Kind::Config, "name": Kind::Must(&Kind::Text),
        } carries ["used_by"]
    }

    #[test]
    fn fields_are_found_by_their_paths() {
        let found = |path: &str| WHOLE.at(path).map(|(path, _)| path);
        for (path, wanted) in [
            ("rule", Some("rule")),
            ("rule.when", Some("rule.when")),
            ("rules[12].when", Some("rules[].when")),
            ("by_name./etc/x.conf.when", Some("by_name.*.when")),
            ("used_by", Some("used_by")),
            ("rules.when", None),
            ("rules[x].when", None),
            ("rule.whe", None),
            ("config.a", None),
            ("nam", None),
        ] {
            assert_eq!(found(path).as_deref(), wanted, "{path}");
        }
        let all: Vec<String> = WHOLE.places().into_iter().map(|(path, _)| path).collect();
        let wanted = [
            "used_by",
            "rule",
            "rule.when",
            "rules",
            "rules[].when",
            "by_name",
            "by_name.*.when",
            "config",
            "name",
        ];
        assert_eq!(all, wanted);
        let row = Described {
            methods: "PUT",
            path: "/x",
            text: "",
            parameters: &[parameters::PROJECT],
            body: Body::Json(&WHOLE),
            answers: &[],
        };
        assert_eq!(row.reads("name", FieldKind::Text).as_deref(), Some("name"));
        assert_eq!(row.reads("name", FieldKind::Flag), None, "of another kind");
        assert_eq!(row.reads("used_by", FieldKind::Any), None, "which has no meaning");
        assert_eq!(row.carries("used_by").as_deref(), Some("used_by"));
        assert!(row.parameter("query", "project") && !row.parameter("header", "project"));
    }
}
