//! The grammar of templates: what images use of pongo2, which Incus renders them with (Django's template language).
//!
//! Text with `{{ expression }}`, `{% if %}` `{% elif %}` `{% else %}`, `{% for x in y %}` and `{% for k, v in y %}` with
//! `{% empty %}`, `{% set x = y %}`, `{# remarks #}`, `{% comment %}`; `-` beside a delimiter takes the white space there.
//! `{% autoescape %}` has no meaning: nothing is ever escaped, as in Incus.

/// Deepest nesting of blocks and of expressions.
const MAX_DEPTH: usize = 32;
/// Most words and signs of one expression: how deep what it is parsed into can be.
const MAX_TOKENS: usize = 256;

/// What is wrong with a template, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    /// Line, from 1.
    pub line: usize,
    /// In words.
    pub what: String,
}

/// A piece of a template, with its line.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Node {
    Text(String),
    Output(usize, Expression),
    If(usize, Vec<(Expression, Vec<Node>)>, Vec<Node>),
    For(usize, Vec<String>, Expression, Vec<Node>, Vec<Node>),
    Set(usize, String, Expression),
}

/// An expression.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Expression {
    Nothing,
    Flag(bool),
    Number(i64),
    Text(String),
    Name(String),
    Member(Box<Expression>, Box<Expression>),
    Call(Box<Expression>, Vec<Expression>),
    Filter(Box<Expression>, String, Option<Box<Expression>>),
    Not(Box<Expression>),
    Both(Box<Expression>, Box<Expression>),
    Either(Box<Expression>, Box<Expression>),
    Compare(Box<Expression>, &'static str, Box<Expression>),
}

/// Filters that are known, and whether they take an argument.
pub(super) const FILTERS: &[(&str, bool)] = &[
    ("capfirst", false),
    ("cut", true),
    ("default", true),
    ("default_if_none", true),
    ("first", false),
    ("join", true),
    ("last", false),
    ("length", false),
    ("lower", false),
    ("safe", false),
    ("split", true),
    ("title", false),
    ("upper", false),
];

enum Piece<'a> {
    Text(&'a str),
    Output(usize, &'a str),
    Tag(usize, &'a str),
}

/// Cuts a template at its delimiters.
fn pieces(template: &str) -> Result<Vec<Piece<'_>>, Fault> {
    let mut found = vec![];
    let (mut rest, mut line, mut trim) = (template, 1, false);
    loop {
        let begin = rest
            .match_indices('{')
            .map(|(i, _)| i)
            .find(|i| matches!(rest.as_bytes().get(i + 1), Some(b'{' | b'%' | b'#')));
        let (text, after) = match begin {
            Some(at) => rest.split_at(at),
            None => (rest, ""),
        };
        let kept = if trim { text.trim_start() } else { text };
        line += text.matches('\n').count();
        if begin.is_none() {
            found.push(Piece::Text(kept));
            return Ok(found);
        }
        let kind = after.as_bytes()[1];
        let close = match kind {
            b'{' => "}}",
            b'%' => "%}",
            _ => "#}",
        };
        let end = end_of(&after[2..], close, kind != b'#');
        let end =
            end.ok_or_else(|| Fault { line, what: format!("{:?} is not closed by {close:?}", &after[..2]) })?;
        let inside = &after[2..2 + end];
        let (inside, before) = match inside.strip_prefix('-') {
            Some(inside) => (inside, true),
            None => (inside, false),
        };
        let (inside, behind) = match inside.strip_suffix('-') {
            Some(inside) => (inside, true),
            None => (inside, false),
        };
        found.push(Piece::Text(if before { kept.trim_end() } else { kept }));
        match kind {
            b'{' => found.push(Piece::Output(line, inside)),
            b'%' => found.push(Piece::Tag(line, inside.trim())),
            _ => {}
        }
        line += inside.matches('\n').count();
        trim = behind;
        rest = &after[2 + end + 2..];
    }
}

/// Where `close` is, outside of quoted texts when `quotes`.
fn end_of(text: &str, close: &str, quotes: bool) -> Option<usize> {
    let mut quoted: Option<u8> = None;
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        match (quoted, bytes[at]) {
            (Some(_), b'\\') => at += 1,
            (Some(q), b) if b == q => quoted = None,
            (Some(_), _) => {}
            (None, b'"' | b'\'') if quotes => quoted = Some(bytes[at]),
            (None, _) if bytes[at..].starts_with(close.as_bytes()) => return Some(at),
            _ => {}
        }
        at += 1;
    }
    None
}

/// Parses a template.
pub(super) fn parse(template: &str) -> Result<Vec<Node>, Fault> {
    let pieces = pieces(template)?;
    let mut parser = Blocks { pieces: &pieces, at: 0 };
    let (nodes, end) = parser.block(1, &[], 0)?;
    debug_assert!(end.is_none(), "without an end tag a block ends with the template");
    Ok(nodes)
}

/// Nodes, and the tag that ended them with its line.
type Block<'a> = (Vec<Node>, Option<(usize, &'a str)>);

struct Blocks<'a, 'b> {
    pieces: &'b [Piece<'a>],
    at: usize,
}

impl<'a> Blocks<'a, '_> {
    /// Nodes of a block that began on line `begun`, until a tag of `ends`, which is answered with its line; until the end of
    /// the template without `ends`.
    fn block(&mut self, begun: usize, ends: &[&str], depth: usize) -> Result<Block<'a>, Fault> {
        let mut nodes = vec![];
        let pieces = self.pieces;
        while let Some(piece) = pieces.get(self.at) {
            self.at += 1;
            match *piece {
                Piece::Text(text) => {
                    if !text.is_empty() {
                        nodes.push(Node::Text(text.to_owned()));
                    }
                }
                Piece::Output(line, text) => nodes.push(Node::Output(line, expression(line, text)?)),
                Piece::Tag(line, tag) => {
                    let (word, rest) = tag.split_once(char::is_whitespace).unwrap_or((tag, ""));
                    if ends.contains(&word) {
                        return Ok((nodes, Some((line, tag))));
                    }
                    if depth >= MAX_DEPTH {
                        return Err(Fault { line, what: format!("blocks lie more than {MAX_DEPTH} deep") });
                    }
                    self.tag(line, word, rest.trim(), depth, &mut nodes)?;
                }
            }
        }
        match ends.last() {
            None => Ok((nodes, None)),
            Some(end) => Err(Fault { line: begun, what: format!("{{% {end} %}} is missing") }),
        }
    }

    fn tag(
        &mut self,
        line: usize,
        word: &str,
        rest: &str,
        depth: usize,
        nodes: &mut Vec<Node>,
    ) -> Result<(), Fault> {
        let fault = |what: String| Fault { line, what };
        match word {
            "if" => {
                let mut arms = vec![];
                let (mut condition, mut otherwise) = (expression(line, rest)?, vec![]);
                loop {
                    let (body, end) = self.block(line, &["elif", "else", "endif"], depth + 1)?;
                    arms.push((condition, body));
                    let (at, tag) = end.unwrap_or((line, "endif"));
                    if let Some(next) = tag.strip_prefix("elif") {
                        condition = expression(at, next)?;
                        continue;
                    }
                    if tag == "else" {
                        otherwise = self.block(line, &["endif"], depth + 1)?.0;
                    }
                    break;
                }
                nodes.push(Node::If(line, arms, otherwise));
            }
            "for" => {
                let wrong = || fault(format!("{{% for {rest} %}}: write \"for NAME in VALUES\""));
                let (names, values) = rest.split_once(" in ").ok_or_else(wrong)?;
                let names: Vec<String> = names.split(',').map(|n| n.trim().to_owned()).collect();
                if names.len() > 2 || !names.iter().all(|n| is_name(n)) {
                    return Err(wrong());
                }
                let values = expression(line, values)?;
                let (body, end) = self.block(line, &["empty", "endfor"], depth + 1)?;
                let empty = match end {
                    Some((_, "empty")) => self.block(line, &["endfor"], depth + 1)?.0,
                    _ => vec![],
                };
                nodes.push(Node::For(line, names, values, body, empty));
            }
            "set" => {
                let (name, value) = rest
                    .split_once('=')
                    .filter(|(name, _)| is_name(name.trim()))
                    .ok_or_else(|| fault(format!("{{% set {rest} %}}: write \"set NAME = VALUE\"")))?;
                nodes.push(Node::Set(line, name.trim().to_owned(), expression(line, value)?));
            }
            "comment" => drop(self.block(line, &["endcomment"], depth + 1)?),
            "autoescape" => nodes.append(&mut self.block(line, &["endautoescape"], depth + 1)?.0),
            _ => return Err(fault(format!("{{% {word} %}} is not known here"))),
        }
        Ok(())
    }
}

fn is_name(s: &str) -> bool {
    let mut chars = s.chars();
    chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
        && chars.all(|c| c.is_ascii_alphanumeric() || c == '_')
}

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Text(String),
    Number(i64),
    Name(String),
    Sign(&'static str),
}

const SIGNS: &[&str] =
    &["==", "!=", "<=", ">=", "&&", "||", "<", ">", "(", ")", "[", "]", ".", ",", "|", ":", "!"];

fn tokens(line: usize, text: &str) -> Result<Vec<Token>, Fault> {
    let fault = |what: String| Fault { line, what };
    let mut found = vec![];
    let mut rest = text.trim();
    while let Some(c) = rest.chars().next() {
        let used = if c == '"' || c == '\'' {
            let mut value = String::new();
            let mut chars = rest.char_indices().skip(1);
            loop {
                match chars.next() {
                    None => return Err(fault("a text is not closed".into())),
                    Some((_, '\\')) => value.extend(chars.next().map(|(_, c)| c)),
                    Some((i, end)) if end == c => {
                        found.push(Token::Text(value));
                        break i + 1;
                    }
                    Some((_, other)) => value.push(other),
                }
            }
        } else if c.is_ascii_digit() {
            let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            let number =
                rest[..end].parse().map_err(|_| fault(format!("{:?} is too large", &rest[..end])))?;
            found.push(Token::Number(number));
            end
        } else if c.is_ascii_alphabetic() || c == '_' {
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
            found.push(Token::Name(rest[..end].to_owned()));
            end
        } else {
            let sign = SIGNS.iter().find(|s| rest.starts_with(**s));
            let sign = sign.ok_or_else(|| fault(format!("{c:?} has no meaning here")))?;
            found.push(Token::Sign(sign));
            sign.len()
        };
        rest = rest[used..].trim_start();
    }
    Ok(found)
}

/// Parses an expression.
fn expression(line: usize, text: &str) -> Result<Expression, Fault> {
    let tokens = tokens(line, text)?;
    if tokens.len() > MAX_TOKENS {
        return Err(Fault {
            line,
            what: format!("an expression has more than {MAX_TOKENS} words and signs"),
        });
    }
    let mut reader = Reader { tokens: &tokens, at: 0, line, depth: 0 };
    let found = reader.either()?;
    match reader.peek() {
        None => Ok(found),
        Some(token) => Err(reader.fault(format!("{token:?} is more than an expression"))),
    }
}

struct Reader<'a> {
    tokens: &'a [Token],
    at: usize,
    line: usize,
    depth: usize,
}

impl Reader<'_> {
    fn fault(&self, what: String) -> Fault {
        Fault { line: self.line, what }
    }

    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at)
    }

    /// Takes one of these signs or words.
    fn take(&mut self, words: &[&'static str]) -> Option<&'static str> {
        let found = match self.peek()? {
            Token::Sign(s) => words.iter().find(|w| *w == s),
            Token::Name(n) => words.iter().find(|w| **w == n.as_str()),
            _ => None,
        };
        self.at += usize::from(found.is_some());
        found.copied()
    }

    fn demand(&mut self, sign: &'static str) -> Result<(), Fault> {
        self.take(&[sign]).map(drop).ok_or_else(|| self.fault(format!("{sign:?} is missing")))
    }

    fn either(&mut self) -> Result<Expression, Fault> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.fault(format!("an expression is nested more than {MAX_DEPTH} deep")));
        }
        let mut left = self.both()?;
        while self.take(&["or", "||"]).is_some() {
            left = Expression::Either(Box::new(left), Box::new(self.both()?));
        }
        self.depth -= 1;
        Ok(left)
    }

    fn both(&mut self) -> Result<Expression, Fault> {
        let mut left = self.negated()?;
        while self.take(&["and", "&&"]).is_some() {
            left = Expression::Both(Box::new(left), Box::new(self.negated()?));
        }
        Ok(left)
    }

    fn negated(&mut self) -> Result<Expression, Fault> {
        let mut not = false;
        while self.take(&["not", "!"]).is_some() {
            not = !not;
        }
        let inner = self.compared()?;
        Ok(if not { Expression::Not(Box::new(inner)) } else { inner })
    }

    fn compared(&mut self) -> Result<Expression, Fault> {
        let left = self.filtered()?;
        let Some(sign) = self.take(&["==", "!=", "<=", ">=", "<", ">", "in"]) else { return Ok(left) };
        Ok(Expression::Compare(Box::new(left), sign, Box::new(self.filtered()?)))
    }

    fn filtered(&mut self) -> Result<Expression, Fault> {
        let mut value = self.value()?;
        while self.take(&["|"]).is_some() {
            let Some(Token::Name(name)) = self.peek().cloned() else {
                return Err(self.fault("the name of a filter is missing after \"|\"".into()));
            };
            self.at += 1;
            let known = FILTERS.iter().find(|(n, _)| *n == name);
            let (_, takes) =
                known.ok_or_else(|| self.fault(format!("the filter {name:?} is not known here")))?;
            let argument = match self.take(&[":"]) {
                Some(_) => Some(Box::new(self.value()?)),
                None => None,
            };
            if *takes != argument.is_some() {
                let what = if *takes { "needs an argument" } else { "takes no argument" };
                return Err(self.fault(format!("the filter {name:?} {what}")));
            }
            value = Expression::Filter(Box::new(value), name, argument);
        }
        Ok(value)
    }

    fn value(&mut self) -> Result<Expression, Fault> {
        let token = self.peek().cloned().ok_or_else(|| self.fault("an expression is missing".into()))?;
        self.at += 1;
        let mut value = match token {
            Token::Text(s) => Expression::Text(s),
            Token::Number(n) => Expression::Number(n),
            Token::Name(n) => match n.as_str() {
                "true" | "True" => Expression::Flag(true),
                "false" | "False" => Expression::Flag(false),
                "nil" | "None" => Expression::Nothing,
                _ => Expression::Name(n),
            },
            Token::Sign("(") => {
                let inner = self.either()?;
                self.demand(")")?;
                inner
            }
            Token::Sign(sign) => return Err(self.fault(format!("{sign:?} is not the beginning of a value"))),
        };
        loop {
            match self.take(&[".", "[", "("]) {
                Some(".") => {
                    let key = match self.peek().cloned() {
                        Some(Token::Name(n)) => n,
                        Some(Token::Number(n)) => n.to_string(),
                        _ => return Err(self.fault("a name is missing after \".\"".into())),
                    };
                    self.at += 1;
                    value = Expression::Member(Box::new(value), Box::new(Expression::Text(key)));
                }
                Some("[") => {
                    let key = self.either()?;
                    self.demand("]")?;
                    value = Expression::Member(Box::new(value), Box::new(key));
                }
                Some(_) => {
                    let mut arguments = vec![];
                    while self.take(&[")"]).is_none() {
                        if !arguments.is_empty() {
                            self.demand(",")?;
                        }
                        arguments.push(self.either()?);
                    }
                    value = Expression::Call(Box::new(value), arguments);
                }
                None => return Ok(value),
            }
        }
    }
}
