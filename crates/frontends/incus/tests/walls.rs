//! The walls between projects: every path of the table, asked by everybody who has a say elsewhere, for what is in a project
//! that he may not see; the same in the bodies of requests, in lists, and in events. A refusal must not tell whether the thing
//! is there: it is word for word what is answered of a thing that is nowhere.
#![allow(clippy::disallowed_methods)] // a test

use crate::{
    access::{FINGERPRINT, Names, OTHER_CERTIFICATE, SHARED, addressed, body, furnished, with},
    common::{Answer, Server, next},
    every_endpoint::everything,
};
use http_body_util::Full;
use hyper::{Method, Request, body::Bytes, client::conn::http1::SendRequest};
use hyper_util::rt::TokioIo;
use karst_engine::{
    Context,
    saga::runner::{Interference, Moment},
};
use karst_frontend_incus::{
    routes::{Row, State, TABLE},
    serve_connection,
};
use karst_model::{
    Error, InstanceId,
    access::{Permission, Principal, Role},
};
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::net::UnixStream;
use tokio_tungstenite::{WebSocketStream, tungstenite::Message};

/// What the names of everything hidden begin with, and what those of nothing begin with: as long, so that no text differs by it.
const HIDDEN: &str = "sekret";
const ABSENT: &str = "absent";
/// Where they are, and where the askers are at home.
const THEIRS: &str = "sekretproj";
/// The UUID of a secret there.
const SECRET: &str = "00000000-0000-4000-8000-0000005e4e7d";
const HOME: &str = "beta";

/// A server with things in a project that nobody here may see, beside what [`furnished`] puts into the default project.
struct Site {
    s: Server,
    names: Names,
    operation: String,
    warning: String,
    /// Fingerprint of the hidden image.
    image: String,
    /// UUID of the hidden container.
    uuid: String,
    mac: String,
    address: String,
}

/// Who asks, and the project that is his.
struct Asker {
    who: String,
    principal: Principal,
    home: &'static str,
}

fn root() -> Value {
    json!({"type": "disk", "path": "/", "pool": "default"})
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text")).to_owned()
}

impl Site {
    async fn build() -> Self {
        let (s, names) = furnished().await;
        for project in [THEIRS, HOME] {
            assert_eq!(s.post("/1.0/projects", json!({"name": project})).await.status, 201);
        }
        let nic = json!({"type": "nic", "network": names.network});
        let devices = json!({"root": root(), "eth0": nic});
        for (name, kind) in [("sekret-c", "container"), ("sekret-v", "virtual-machine")] {
            let body = json!({"name": name, "type": kind, "description": "sekret words", "source": {"type": "none"},
                "devices": devices, "start": true});
            s.done(s.post(&format!("/1.0/instances?project={THEIRS}"), body).await).await;
        }
        let profile = json!({"name": "sekret-prof", "config": {"user.x": "sekret"}});
        assert_eq!(s.post(&format!("/1.0/profiles?project={THEIRS}"), profile).await.status, 201);
        let volumes = "/1.0/storage-pools/default/volumes/custom";
        let volume = json!({"name": "sekret-vol"});
        assert_eq!(s.post(&format!("{volumes}?project={THEIRS}"), volume).await.status, 201);
        for of in ["/1.0/instances/sekret-c".to_owned(), format!("{volumes}/sekret-vol")] {
            for (what, name) in [("snapshots", "sekret-snap"), ("backups", "sekret-kept")] {
                let path = format!("{of}/{what}?project={THEIRS}");
                s.done(s.post(&path, json!({"name": name})).await).await;
            }
        }
        let path = format!("/1.0/images?project={THEIRS}");
        let headers = [("x-incus-aliases", "alias=sekret-img")];
        let made = s.done(s.send(Method::POST, &path, &headers, "a hidden image").await).await;
        let robot = json!({"name": "sekret-robot", "role": "viewer", "projects": [THEIRS]});
        assert_eq!(s.post("/1.0/karst/tokens", robot).await.status, 200);
        s.engine.set_secret_key(karst_engine::secrets::SecretKey::new(&[7; 32]).unwrap());
        let registry = format!("/1.0/karst/registries/registry.sekret.example?project={THEIRS}");
        assert_eq!(s.put(&registry, json!({"user": "sekret", "password": "sekret"})).await.status, 200);
        let secret = json!({"uuid": SECRET, "type": "volume", "usage": "sekret", "value": "sekret"});
        assert_eq!(s.post(&format!("/1.0/karst/secrets?project={THEIRS}"), secret).await.status, 200);
        let path = format!("/1.0/instances/sekret-c?project={THEIRS}");
        let config = s.get(&path).await.metadata()["config"].clone();
        let site = Self {
            operation: String::new(),
            warning: String::new(),
            image: text(&made["metadata"]["fingerprint"]),
            uuid: text(&config["volatile.uuid"]),
            mac: text(&config["volatile.eth0.hwaddr"]),
            address: String::new(),
            names,
            s,
        };
        site.with_what_comes_later().await
    }

    /// A program that waits for its websockets, an address, a warning about work that could not be undone.
    async fn with_what_comes_later(mut self) -> Self {
        self.s.engine.set_hook(Some(Arc::new(|saga: &str, moment| match (saga, moment) {
            ("instance-create", Moment::AfterStep(0) | Moment::BeforeUndo(0)) => {
                Interference::Fail(Error::unavailable("the disk is gone"))
            }
            _ => Interference::None,
        })));
        let stuck = json!({"name": "sekret-b", "source": {"type": "none"}, "devices": {"root": root()}});
        let stuck = self.s.post(&format!("/1.0/instances?project={THEIRS}"), stuck).await;
        assert_ne!(self.s.wait(stuck).await["status_code"], 200);
        self.s.engine.set_hook(None);
        let exec = json!({"command": ["sleep", "infinity"], "wait-for-websocket": true, "interactive": true});
        let exec = self.s.post(&format!("/1.0/instances/sekret-c/exec?project={THEIRS}"), exec).await.json();
        self.operation = text(&exec["operation"]).rsplit('/').next().unwrap().to_owned();
        let wait = async {
            loop {
                let warnings =
                    self.s.get(&format!("/1.0/warnings?recursion=1&project={THEIRS}")).await.metadata();
                let state = format!("/1.0/instances/sekret-c/state?project={THEIRS}");
                let state = self.s.get(&state).await.metadata();
                let address = &state["network"]["eth0"]["addresses"][0]["address"];
                if let (Some(warning), Some(address)) = (warnings[0]["uuid"].as_str(), address.as_str()) {
                    return (warning.to_owned(), address.to_owned());
                }
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        };
        let found = tokio::time::timeout(crate::common::PATIENCE, wait).await;
        (self.warning, self.address) = found.expect("a warning and an address in time");
        self
    }

    /// The same question about what is nowhere, and the same answer about it.
    fn absent(&self, text: &str) -> String {
        let nowhere = |id: &str, other: char| {
            let other = if id.starts_with(other) { 'e' } else { other };
            id.chars().map(|c| if c == '-' { c } else { other }).collect::<String>()
        };
        let mut text = text.replace(HIDDEN, ABSENT);
        for id in [&self.operation, &self.warning, &self.image, &self.uuid, &FINGERPRINT.to_owned()] {
            text = text.replace(id.as_str(), &nowhere(id, 'd'));
        }
        text
    }

    /// What of the hidden things an answer tells.
    fn told(&self, answer: &str) -> Option<String> {
        let marks = [HIDDEN, &self.operation, &self.warning, &self.image, &self.uuid, &self.mac];
        let address = [format!("\"{}\"", self.address), format!("{}/", self.address)];
        let mut all = marks.into_iter().map(str::to_owned).chain(address);
        all.find(|mark| answer.contains(mark.as_str()))
    }

    fn project(&self, name: &str) -> karst_model::ProjectId {
        let admin = Context::new(Principal::unix_admin(0, 0, 1));
        self.s.engine.project(&admin, name, Permission::ProjectView).unwrap().id
    }

    /// Each role over a project of its own, certificates that are restricted to it, and who runs the default project.
    async fn askers(&self) -> Vec<Asker> {
        let mut all = vec![];
        for role in Role::ALL {
            let principal = with(*role, Some(self.project(HOME)));
            all.push(Asker { who: format!("{} of {HOME}", role.as_str()), principal, home: HOME });
        }
        for role in [Role::Admin, Role::Viewer] {
            let principal = with(role, Some(self.project("default")));
            all.push(Asker { who: format!("{} of default", role.as_str()), principal, home: "default" });
        }
        for kind in ["metrics", "client"] {
            let body = json!({"name": kind, "type": kind, "restricted": true, "projects": [HOME],
                "certificate": OTHER_CERTIFICATE});
            let added = self.s.post("/1.0/certificates", body).await;
            assert_eq!(added.status, 201);
            let path = added.header("location").to_owned();
            let fingerprint = path.rsplit('/').next().unwrap();
            let principal = self.s.engine.principal_by_certificate(fingerprint, "192.0.2.9:1");
            assert!(principal.is_known());
            all.push(Asker { who: format!("restricted {kind} certificate"), principal, home: HOME });
            // The next one is the same certificate; the last one stays trusted, as events are for who is.
            if kind == "metrics" {
                assert_eq!(self.s.delete(&path).await.status, 200);
            }
        }
        all
    }

    /// The path of a row with the hidden things in it.
    fn path(&self, row: &Row) -> String {
        let mut p = row.path.replace("karst/instances/{name}", "karst/instances/sekret-v");
        for (collection, name) in [
            ("instances", "sekret-c"),
            ("networks", self.names.network.as_str()),
            ("network-acls", "web"),
            ("network-address-sets", "office"),
            ("storage-pools", "default"),
            ("profiles", "sekret-prof"),
            ("projects", THEIRS),
            ("images/aliases", "sekret-img"),
            ("karst/tokens", "sekret-robot"),
        ] {
            p = p.replace(&format!("{collection}/{{name}}"), &format!("{collection}/{name}"));
        }
        for (parameter, value) in [
            ("warnings/{uuid}", format!("warnings/{}", self.warning)),
            ("certificates/{fingerprint}", format!("certificates/{FINGERPRINT}")),
            ("{fingerprint}", self.image.clone()),
            ("operations/{id}", format!("operations/{}", self.operation)),
            ("{listenAddress}", "192.0.2.50".into()),
            ("{type}", "custom".into()),
            ("{volumeName}", "sekret-vol".into()),
            ("{snapshot}", "sekret-snap".into()),
            ("{snapshotName}", "sekret-snap".into()),
            ("{backup}", "sekret-kept".into()),
            ("{backupName}", "sekret-kept".into()),
            ("{filename}", "lxc.log".into()),
            ("secrets/{uuid}", format!("secrets/{SECRET}")),
            ("registries/{host}", "registries/registry.sekret.example".into()),
        ] {
            p = p.replace(parameter, &value);
        }
        assert!(!p.contains('{'), "{p}");
        p += match row.path {
            "/1.0/karst/network/explain" => "?from=sekret-c&to=192.0.2.9&port=80",
            "/1.0/karst/access/why" => "?permission=instance_use&object=project/sekretproj",
            "/1.0/operations/{id}/websocket" => "?secret=guessed",
            path if path.ends_with("/files") => "?path=/etc/hostname",
            _ => "",
        };
        addressed(&row.method, p)
    }

    /// Everything that a change could be seen in.
    async fn everything(&self) -> Vec<Value> {
        let mut all = everything(&self.s).await;
        for project in [THEIRS, HOME] {
            for path in [
                "instances",
                "profiles",
                "images",
                "images/aliases",
                "storage-pools/default/volumes",
                "instances/sekret-c/snapshots",
                "instances/sekret-c/backups",
                "instances/sekret-c/metadata",
                "storage-pools/default/volumes/custom/sekret-vol/snapshots",
                "storage-pools/default/volumes/custom/sekret-vol/backups",
            ] {
                let answer = self.s.get(&format!("/1.0/{path}?recursion=1&project={project}")).await;
                all.push(answer.json_or_null()["metadata"].clone());
            }
        }
        all
    }
}

/// A connection of somebody, kept for many requests.
struct Line<'a> {
    site: &'a Site,
    principal: Principal,
    sender: Option<SendRequest<Full<Bytes>>>,
}

impl<'a> Line<'a> {
    fn of(site: &'a Site, asker: &Asker) -> Self {
        Self { site, principal: asker.principal.clone(), sender: None }
    }

    async fn connect(&self) -> SendRequest<Full<Bytes>> {
        let (near, far) = UnixStream::pair().unwrap();
        tokio::spawn(serve_connection(self.site.s.app.clone(), Context::new(self.principal.clone()), far));
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(near)).await.unwrap();
        tokio::spawn(connection);
        sender
    }

    async fn ask(&mut self, method: &Method, path: &str, body: &str) -> Answer {
        use http_body_util::BodyExt;
        let mut sender = match self.sender.take() {
            None => self.connect().await,
            Some(mut open) => match open.ready().await {
                Ok(()) => open,
                // An answer has ended the connection.
                Err(_) => self.connect().await,
            },
        };
        let mut request = Request::builder().method(method.clone()).uri(path).header("host", "unix.socket");
        if path.contains("/websocket?") {
            request = request.header("connection", "upgrade").header("upgrade", "websocket");
            request = request.header("sec-websocket-key", "AAAAAAAAAAAAAAAAAAAAAA==");
        }
        if body.starts_with('{') {
            request = request.header("content-type", "application/json");
        }
        let request = request.body(Full::new(Bytes::copy_from_slice(body.as_bytes()))).unwrap();
        let exchange = async {
            let (head, body) = sender.send_request(request).await.unwrap().into_parts();
            let body = body.collect().await.unwrap().to_bytes();
            Answer { status: head.status.as_u16(), headers: head.headers, body }
        };
        let answer =
            tokio::time::timeout(crate::common::PATIENCE, exchange).await.expect("an answer in time");
        self.sender = Some(sender);
        answer
    }

    /// Asks for what is hidden and for what is nowhere; answers what is wrong with the answers.
    async fn compare(&mut self, method: &Method, path: &str, body: &str) -> Option<String> {
        let site = self.site;
        let real = self.ask(method, path, body).await;
        let answer = String::from_utf8_lossy(&real.body);
        if ![403, 404].contains(&real.status) {
            return Some(format!("{} {answer}", real.status));
        }
        let control = self.ask(method, &site.absent(path), &site.absent(body)).await;
        let nowhere = String::from_utf8_lossy(&control.body);
        let same = real.status == control.status && site.absent(&answer) == nowhere;
        (!same).then(|| format!("{} {answer}, and of nothing {} {nowhere}", real.status, control.status))
    }

    /// Asks for what may be answered; then it says nothing of what is hidden.
    async fn look(&mut self, path: &str) -> Option<String> {
        let answer = self.ask(&Method::GET, path, "").await;
        if answer.status != 200 {
            return self.compare(&Method::GET, path, "").await;
        }
        let text = String::from_utf8_lossy(&answer.body);
        let mark = self.site.told(&text)?;
        // What was asked is said again, of whatever it is.
        let nowhere = self.ask(&Method::GET, &self.site.absent(path), "").await;
        let echo = self.site.absent(&text) == String::from_utf8_lossy(&nowhere.body);
        (!echo).then(|| format!("{mark:?} is told: {text}"))
    }
}

fn query(path: &str, more: &str) -> String {
    format!("{path}{}{more}", if path.contains('?') { '&' } else { '?' })
}

fn none(faults: &[String], before: &[Value], after: &[Value]) {
    let changed = before.iter().zip(after).filter(|(b, a)| b != a);
    let changed: Vec<_> = changed.map(|(b, a)| format!("changed from {b} to {a}")).collect();
    assert!(faults.is_empty() && changed.is_empty(), "{faults:#?} {changed:#?}");
}

/// Paths that belong to no project, or list what the asker may see, whatever is asked for.
fn is_shared(row: &Row) -> bool {
    row.method == Method::GET && SHARED.contains(&row.path)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_in_a_project_is_nowhere_for_others() {
    let site = Site::build().await;
    let askers = site.askers().await;
    let before = site.everything().await;
    let (mut faults, mut asked) = (vec![], 0);
    for asker in askers {
        let mut line = Line::of(&site, &asker);
        for row in TABLE.iter().filter(|r| matches!(r.state, State::Done(..))) {
            let path = site.path(row);
            let body = body(&row.method, row.path, &site.image);
            let is_hidden = site.absent(&path) != path;
            let mut fault = |way: &str, fault: Option<String>| {
                asked += 1;
                faults.extend(
                    fault.map(|f| format!("{} {} ({way}, {}): {f}", row.method, row.path, asker.who)),
                );
            };
            // By its project.
            let there = query(&path, &format!("project={THEIRS}"));
            match is_shared(row) {
                true => fault("there", line.look(&there).await),
                false => fault("there", line.compare(&row.method, &there, &body).await),
            }
            // By its name alone, from a project that has none of that name; lists say nothing of it either.
            if row.path == "/1.0/events" {
                continue;
            }
            let here = query(&path, &format!("project={}", asker.home));
            // Each project has its own there, of whatever registry.
            if row.path == "/1.0/karst/registries/{host}" && row.method != Method::GET {
                continue;
            }
            // Who runs the default project may change its networks; that these tell nothing has a test of its own.
            let changes = asker.home == HOME
                && row.method != Method::GET
                && row.path.ends_with('}')
                && !row.path.ends_with("{type}");
            if is_hidden && !is_shared(row) || changes {
                fault("here", line.compare(&row.method, &here, &body).await);
            } else if row.method == Method::GET {
                for more in
                    ["recursion=0", "recursion=1", "recursion=2&all-projects=true", "all-projects=true"]
                {
                    fault("list", line.look(&query(&here, more)).await);
                }
            }
            // By its UUID, as libvirt's clients and our own records name it.
            for (name, id) in [("instances/sekret-c", &site.uuid), ("profiles/sekret-prof", &site.uuid)] {
                if path.contains(name) && asker.who.contains("operator") {
                    let collection = name.split('/').next().unwrap();
                    let by_id = here.replace(name, &format!("{collection}/{id}"));
                    fault("by UUID", line.compare(&row.method, &by_id, &body).await);
                }
            }
        }
    }
    assert!(asked > 2500, "the table is looked at: {asked}");
    none(&faults, &before, &site.everything().await);
}

/// What bodies name: sources of copies, images, backups and moves, places to go to, profiles, devices, roles.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_reach_nothing_of_others() {
    let site = Site::build().await;
    let s = &site.s;
    for (name, kind) in [("mine", "container"), ("machine", "virtual-machine")] {
        let body =
            json!({"name": name, "type": kind, "source": {"type": "none"}, "devices": {"root": root()}});
        s.done(s.post(&format!("/1.0/instances?project={HOME}"), body).await).await;
    }
    let volumes = "/1.0/storage-pools/default/volumes/custom";
    let image = site.image.as_str();
    for (path, body) in [
        (volumes, json!({"name": "own"})),
        (
            "/1.0/profiles",
            json!({"name": "reaching", "devices": {"root": root(),
            "d": {"type": "disk", "pool": "default", "source": "sekret-vol", "path": "/d"}}}),
        ),
        // The control names this one, which has the same device of a volume that is nowhere.
        (
            "/1.0/profiles",
            json!({"name": "absent-reaching", "devices": {"root": root(),
            "d": {"type": "disk", "pool": "default", "source": "absent-vol", "path": "/d"}}}),
        ),
    ] {
        assert_eq!(s.post(&format!("{path}?project={HOME}"), body).await.status, 201, "{path}");
    }
    let new = |more: Value| {
        let mut body = json!({"name": "new", "source": {"type": "none"}, "devices": {"root": root()}});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let (instances, mine, machine) = ("/1.0/instances", "/1.0/instances/mine", "/1.0/instances/machine");
    let disk = json!({"type": "disk", "pool": "default", "source": "sekret-vol", "path": "/d"});
    let kernel = json!({"type": "kernel", "pool": "default", "source": "sekret-vol/vmlinuz"});
    let theirs = format!("{instances}/sekret-c?project={THEIRS}");
    let theirs_vol = format!("{volumes}/sekret-vol?project={THEIRS}");
    let own = format!("{volumes}/own");
    let (theirs, theirs_vol, own) = (theirs.as_str(), theirs_vol.as_str(), own.as_str());
    let attacks: Vec<(&str, &str, Value)> = vec![
        // Copies and images of instances and of their snapshots.
        (
            "POST",
            instances,
            new(json!({"source": {"type": "copy", "source": "sekret-c", "project": THEIRS}})),
        ),
        ("POST", instances, new(json!({"source": {"type": "copy", "source": "sekret-c"}}))),
        (
            "POST",
            instances,
            new(json!({"source": {"type": "copy", "source": "sekret-c/sekret-snap", "project": THEIRS}})),
        ),
        (
            "POST",
            instances,
            json!({"name": "mine", "source": {"type": "copy", "source": "sekret-c", "project": THEIRS, "refresh": true}}),
        ),
        ("POST", instances, new(json!({"source": {"type": "copy", "source": site.uuid}}))),
        (
            "POST",
            "/1.0/images",
            json!({"source": {"type": "instance", "name": "sekret-c", "project": THEIRS}}),
        ),
        ("POST", "/1.0/images", json!({"source": {"type": "instance", "name": "sekret-c"}})),
        (
            "POST",
            "/1.0/images",
            json!({"source": {"type": "snapshot", "name": "sekret-c/sekret-snap", "project": THEIRS}}),
        ),
        // Images of theirs.
        (
            "POST",
            instances,
            new(json!({"source": {"type": "image", "alias": "sekret-img", "project": THEIRS}})),
        ),
        ("POST", instances, new(json!({"source": {"type": "image", "fingerprint": image}}))),
        (
            "POST",
            instances,
            new(json!({"source": {"type": "image", "fingerprint": image, "project": THEIRS}})),
        ),
        ("POST", "/1.0/instances/mine/rebuild", json!({"source": {"type": "image", "alias": "sekret-img"}})),
        ("POST", "/1.0/images/aliases", json!({"name": "new", "target": image})),
        // Moves in both directions.
        ("POST", mine, json!({"name": "mine", "migration": true, "project": THEIRS})),
        ("POST", theirs, json!({"name": "new", "migration": true, "project": HOME})),
        ("POST", own, json!({"name": "own", "project": THEIRS})),
        ("POST", theirs_vol, json!({"name": "new", "project": HOME})),
        // Volumes.
        (
            "POST",
            volumes,
            json!({"name": "new", "source": {"type": "copy", "name": "sekret-vol", "pool": "default", "project": THEIRS}}),
        ),
        (
            "POST",
            volumes,
            json!({"name": "new", "source": {"type": "copy", "name": "sekret-vol", "pool": "default"}}),
        ),
        (
            "POST",
            volumes,
            json!({"name": "new", "source": {"type": "copy", "name": "sekret-vol/sekret-snap", "pool": "default", "project": THEIRS}}),
        ),
        (
            "POST",
            volumes,
            json!({"name": "own", "source": {"type": "copy", "name": "sekret-vol", "pool": "default", "project": THEIRS, "refresh": true}}),
        ),
        // Devices and profiles.
        ("POST", instances, new(json!({"devices": {"root": root(), "d": disk}}))),
        ("PATCH", mine, json!({"devices": {"d": disk}})),
        ("PATCH", machine, json!({"devices": {"k": kernel}})),
        ("POST", instances, new(json!({"profiles": ["sekret-prof"]}))),
        ("PATCH", mine, json!({"profiles": ["sekret-prof"]})),
        // Snapshots of theirs.
        ("PUT", mine, json!({"restore": "sekret-snap"})),
        ("PUT", own, json!({"restore": "sekret-snap"})),
        ("PUT", theirs, json!({"restore": "sekret-snap"})),
        // Power over all of a project.
        ("PUT", "/1.0/instances?project=sekretproj", json!({"state": {"action": "stop"}})),
        // Rights.
        ("POST", "/1.0/karst/access", json!({"principal": "sekret-robot", "role": "admin", "project": HOME})),
        ("POST", "/1.0/karst/access", json!({"principal": "me", "role": "admin", "project": THEIRS})),
        (
            "POST",
            "/1.0/certificates",
            json!({"name": "x", "certificate": OTHER_CERTIFICATE, "restricted": true, "projects": [THEIRS]}),
        ),
        (
            "POST",
            "/1.0/certificates",
            json!({"name": "x", "token": true, "restricted": true, "projects": [THEIRS]}),
        ),
        ("POST", "/1.0/karst/tokens", json!({"name": "x", "role": "viewer", "projects": [THEIRS]})),
        (
            "GET",
            "/1.0/karst/access/why?permission=project_view&object=/1.0/instances/sekret-c%3Fproject=sekretproj",
            json!({}),
        ),
        (
            "GET",
            "/1.0/karst/access/why?permission=project_view&object=project/beta&principal=sekret-robot",
            json!({}),
        ),
        ("GET", "/1.0/karst/network/explain?from=sekret-c&to=192.0.2.1&port=80", json!({})),
        ("GET", "/1.0/karst/network/explain?from=192.0.2.1&to=sekret-c&port=80", json!({})),
        ("GET", "/1.0/instances/mine/snapshots/sekret-snap", json!({})),
    ];
    let askers = site.askers().await;
    let askers: Vec<_> = askers.iter().filter(|a| a.home == HOME).collect();
    let before = site.everything().await;
    let mut faults = vec![];
    for asker in &askers {
        let mut line = Line::of(&site, asker);
        for (method, path, body) in &attacks {
            let path = match path.contains("project=sekret") {
                true => (*path).to_owned(),
                false => query(path, &format!("project={HOME}")),
            };
            let body = if *method == "GET" { String::new() } else { body.to_string() };
            let method: Method = method.parse().unwrap();
            let fault = line.compare(&method, &path, &body).await;
            faults.extend(fault.map(|f| format!("{method} {path} {body} ({}): {f}", asker.who)));
        }
    }
    assert!(askers.len() > 5);
    none(&faults, &before, &site.everything().await);
    // A profile may name a volume that is not there; whoever then uses it is refused as if it were nowhere.
    let mut line = Line::of(&site, askers[0]);
    let path = format!("/1.0/instances?project={HOME}");
    let refused = line
        .ask(
            &Method::POST,
            &path,
            &json!({"name": "new", "source": {"type": "none"}, "profiles": ["reaching"]}).to_string(),
        )
        .await;
    let nowhere =
        json!({"name": "new", "source": {"type": "none"}, "profiles": ["absent-reaching"]}).to_string();
    let nowhere = line.ask(&Method::POST, &path, &nowhere).await;
    assert_eq!(site.absent(&refused.refused(404)), nowhere.refused(404));
}

/// What projects share (networks, ACLs and profiles of the default project) is used by guests of others: neither
/// those who look at it nor those who change it learn of whom.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_projects_share_does_not_tell_of_their_guests() {
    let site = Site::build().await;
    let s = &site.s;
    let lean =
        json!({"name": "sekretlean", "config": {"features.images": "false", "features.profiles": "false"}});
    let network =
        json!({"name": "lent0", "config": {"ipv4.address": "10.98.7.1/24", "ipv6.address": "none"}});
    for (path, body) in [
        ("/1.0/projects", lean),
        ("/1.0/networks", network),
        ("/1.0/network-acls", json!({"name": "lent-acl"})),
        ("/1.0/profiles", json!({"name": "lent-profile"})),
    ] {
        assert_eq!(s.post(path, body).await.status, 201, "{path}");
    }
    let nic =
        json!({"type": "nic", "network": "lent0", "security.acls": "lent-acl", "ipv4.address": "10.98.7.50"});
    let body = json!({"name": "sekret-user", "source": {"type": "none"}, "profiles": ["default", "lent-profile"],
        "devices": {"eth1": nic}, "start": true});
    s.done(s.post("/1.0/instances?project=sekretlean", body).await).await;
    let user = s.get("/1.0/instances/sekret-user?project=sekretlean").await.metadata();
    let user_id = InstanceId(text(&user["config"]["volatile.uuid"]).parse().unwrap());
    let mac = text(&user["config"]["volatile.eth1.hwaddr"]);
    s.agent.set_refuses_update(user_id, true);
    let taken = |key: &str, value: &str| {
        let nic = json!({"type": "nic", "network": "lent0", key: value});
        json!({"name": "new", "source": {"type": "none"}, "devices": {"eth1": nic}})
    };
    let bad_disk = json!({"type": "disk", "pool": "default", "source": "nowhere", "path": "/x"});
    let probes: Vec<(&str, &str, Value, u16)> = vec![
        ("DELETE", "/1.0/networks/lent0", Value::Null, 409),
        ("POST", "/1.0/networks/lent0", json!({"name": "lent1"}), 409),
        ("PATCH", "/1.0/networks/lent0", json!({"config": {"ipv4.address": "10.98.8.1/24"}}), 409),
        ("DELETE", "/1.0/network-acls/lent-acl", Value::Null, 409),
        ("POST", "/1.0/network-acls/lent-acl", json!({"name": "other"}), 409),
        ("DELETE", "/1.0/profiles/lent-profile", Value::Null, 409),
        ("PATCH", "/1.0/profiles/lent-profile", json!({"devices": {"x": bad_disk}}), 404),
        ("PATCH", "/1.0/profiles/lent-profile", json!({"config": {"limits.memory": "64MiB"}}), 409),
        ("POST", "/1.0/instances", taken("hwaddr", &mac), 409),
        ("POST", "/1.0/instances", taken("ipv4.address", "10.98.7.50"), 409),
        ("GET", "/1.0/networks/lent0", Value::Null, 200),
        ("GET", "/1.0/networks/lent0/leases", Value::Null, 200),
        ("GET", "/1.0/networks/lent0/state", Value::Null, 200),
        ("GET", "/1.0/network-acls/lent-acl", Value::Null, 200),
        ("GET", "/1.0/network-allocations?all-projects=true", Value::Null, 200),
        ("GET", "/1.0/profiles/lent-profile", Value::Null, 200),
        ("GET", "/1.0/karst/network/explain?from=192.0.2.9&to=10.98.7.50&port=80", Value::Null, 200),
        ("GET", "/1.0/karst/network/explain?from=10.98.7.50&to=192.0.2.9&port=80", Value::Null, 200),
    ];
    let askers = site.askers().await;
    let before = everything(s).await;
    let mut faults = vec![];
    for asker in askers.iter().filter(|a| a.who == "admin of default") {
        let mut line = Line::of(&site, asker);
        for (method, path, body, status) in &probes {
            let body = if body.is_null() { String::new() } else { body.to_string() };
            let method: Method = method.parse().unwrap();
            let mut answer = line.ask(&method, path, &body).await;
            if answer.status == 202 {
                let wait = format!("{}/wait?timeout=60", text(&answer.json()["operation"]));
                answer = line.ask(&Method::GET, &wait, "").await;
                answer.status = answer.json()["metadata"]["status_code"].as_u64().unwrap() as u16;
            }
            let said = String::from_utf8_lossy(&answer.body);
            if answer.status != *status || said.contains(HIDDEN) {
                faults.push(format!("{method} {path} {body}: {} {said}", answer.status));
            }
        }
    }
    none(&faults, &before, &everything(s).await);
    // Who may see them is told of whom to ask.
    let used = s.delete("/1.0/networks/lent0").await.refused(409);
    assert!(used.contains("/1.0/instances/sekret-user?project=sekretlean"), "{used}");
}

/// A forward is the host's, and to whom it leads is the business of who sees that guest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forwards_do_not_tell_where_they_lead() {
    let site = Site::build().await;
    let forwards = format!("/1.0/networks/{}/forwards", site.names.network);
    let port = json!({"protocol": "tcp", "listen_port": "443", "target_port": "8443", "target_address": site.address});
    let body = json!({"config": {"target_address": site.address}, "ports": [port]});
    assert_eq!(site.s.put(&format!("{forwards}/192.0.2.50"), body).await.status, 200);
    let whole = site.s.get(&format!("{forwards}/192.0.2.50")).await;
    assert!(site.told(&String::from_utf8_lossy(&whole.body)).is_some(), "who may see it all does");
    let mut looked = 0;
    for asker in site.askers().await.iter().filter(|a| a.home == HOME) {
        let mut line = Line::of(&site, asker);
        for path in [format!("{forwards}?recursion=1"), format!("{forwards}/192.0.2.50")] {
            let answer = line.ask(&Method::GET, &query(&path, &format!("project={HOME}")), "").await;
            let said = String::from_utf8_lossy(&answer.body);
            assert_eq!(site.told(&said), None, "{}: {path}: {said}", asker.who);
            assert!(!said.contains("8443"), "{}: {path}: {said}", asker.who);
            looked += usize::from(answer.status == 200 && said.contains("192.0.2.50"));
        }
    }
    assert!(looked >= 8, "{looked} saw that there is one");
}

/// A listener hears of his own project, and of another only that nothing happens.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_stay_in_their_project() {
    let site = Site::build().await;
    let s = &site.s;
    let mut heard = vec![];
    // Who is trusted no longer is asked nothing: that certificate has become the other one.
    let mine = |a: &Asker| a.home == HOME && a.who != "restricted metrics certificate";
    for asker in site.askers().await.into_iter().filter(mine) {
        let sees = asker.principal.may(Permission::ProjectView, Some(site.project(HOME)));
        for which in ["all-projects=true", "project=beta", "project=sekretproj", "project=absentproj"] {
            let (near, far) = UnixStream::pair().unwrap();
            tokio::spawn(serve_connection(s.app.clone(), Context::new(asker.principal.clone()), far));
            let url = format!("ws://unix.socket/1.0/events?{which}");
            let opened = tokio_tungstenite::client_async(url, near).await;
            let named = which != "all-projects=true";
            match opened {
                Ok((socket, _)) => {
                    assert!(!which.contains(THEIRS) && !which.contains(ABSENT), "{} {which}", asker.who);
                    assert!(sees || !named, "{} {which}", asker.who);
                    heard.push((asker.who.clone(), sees, socket));
                }
                Err(tokio_tungstenite::tungstenite::Error::Http(answer)) => {
                    assert_eq!(answer.status(), 404, "{} {which}", asker.who);
                }
                Err(e) => panic!("{} {which}: {e}", asker.who),
            }
        }
    }
    // Much happens there, and one thing here.
    let path = format!("/1.0/instances/sekret-c?project={THEIRS}");
    s.patch(&path, json!({"description": "sekret again"})).await.metadata();
    let snapshots = format!("/1.0/instances/sekret-c/snapshots?project={THEIRS}");
    s.done(s.post(&snapshots, json!({"name": "sekret-two"})).await).await;
    let state = format!("/1.0/instances/sekret-v/state?project={THEIRS}");
    s.done(s.put(&state, json!({"action": "stop", "force": true})).await).await;
    let exec = json!({"command": ["true"], "wait-for-websocket": false});
    s.done(s.post(&format!("/1.0/instances/sekret-c/exec?project={THEIRS}"), exec).await).await;
    let volume = format!("/1.0/storage-pools/default/volumes/custom?project={THEIRS}");
    assert_eq!(s.post(&volume, json!({"name": "sekret-vol2"})).await.status, 201);
    let beacon = json!({"name": "beacon"});
    assert_eq!(s.post(&format!("/1.0/profiles?project={HOME}"), beacon).await.status, 201);
    assert!(heard.len() > 8);
    heard.sort_by_key(|(_, sees, _)| !sees);
    for (who, sees, mut socket) in heard {
        // Who hears nothing would have heard it by now: others, who listen to the same, have.
        if !sees {
            socket_says_nothing(&who, &mut socket).await;
            continue;
        }
        loop {
            let Some(Message::Text(said)) = next(&mut socket).await else { panic!("{who}: the events end") };
            assert_eq!(site.told(&said), None, "{who}: {said}");
            if said.contains("beacon") {
                break;
            }
        }
    }
}

/// Closes it, and demands that nothing was said before.
async fn socket_says_nothing(who: &str, socket: &mut WebSocketStream<UnixStream>) {
    use futures::{SinkExt, StreamExt};
    socket.send(Message::Close(None)).await.unwrap();
    while let Some(Ok(message)) = socket.next().await {
        assert!(!message.is_text(), "{who}: {message}");
    }
}
