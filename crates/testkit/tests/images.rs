//! Images of servers: what is fetched, kept, followed and let go, over a server that does as it is told.

use karst_engine::{
    compute::create::CreateInstance,
    images::{ImageOptions, push::PushImage, remote::FetchImage},
};
use karst_env::{Env, SeededEnv};
use karst_model::{Config, Result};
use karst_testkit::{
    World,
    scenarios::container,
    servers::{Behaviour, OneImage, source},
};
use std::{sync::Arc, time::Duration};

fn aliased(alias: &str) -> FetchImage {
    let options = ImageOptions { aliases: vec![(alias.into(), String::new())], ..Default::default() };
    FetchImage { source: source("tiny"), options, auto_update: true }
}

async fn world(env: &SeededEnv) -> (World, Arc<OneImage>) {
    let w = World::new(env).await.unwrap();
    let server = Arc::new(OneImage::default());
    server.0.lock().unwrap().content = "an image of a container, the first".into();
    w.engine.set_image_servers(server.clone());
    (w, server)
}

async fn fetch(w: &World, request: FetchImage) -> Result<()> {
    let live = w.engine.image_fetch(&w.admin, "default", request).await?;
    w.ended(live).await.error.clone().map_or(Ok(()), Err)
}

async fn launch(w: &World, name: &str) -> Result<()> {
    let request = CreateInstance { ..container(name) };
    let live = w.engine.instance_create_remote(&w.admin, "default", request, source("tiny")).await?;
    w.ended(live).await.error.clone().map_or(Ok(()), Err)
}

fn fingerprints(w: &World) -> Vec<String> {
    w.engine.images(&w.admin, "default").unwrap().iter().map(|i| i.fingerprint.clone()).collect()
}

#[test]
fn what_is_here_is_not_fetched_again() {
    SeededEnv::run(1, |env| async move {
        let (w, server) = world(&env).await;
        launch(&w, "c1").await.unwrap();
        launch(&w, "c2").await.unwrap();
        let only = |w: &World| w.engine.images(&w.admin, "default").unwrap()[0].origin.clone().unwrap();
        assert!(only(&w).cached);
        fetch(&w, aliased("mine")).await.unwrap();
        assert_eq!((server.0.lock().unwrap().fetched, fingerprints(&w).len()), (1, 1));
        let image = w.engine.image(&w.admin, "default", "mine").unwrap();
        let origin = image.origin.clone().unwrap();
        assert!(!origin.cached && origin.auto_update && image.last_used_at.is_some());
        assert_eq!((image.properties["os"].as_str(), origin.from.alias.as_deref()), ("Tiny", Some("tiny")));
        // Two at once.
        server.0.lock().unwrap().content = "another image".into();
        let (a, b) = (launch(&w, "c3"), launch(&w, "c4"));
        let (a, b) = futures::join!(a, b);
        a.unwrap();
        b.unwrap();
        assert_eq!((server.0.lock().unwrap().fetched, fingerprints(&w).len()), (2, 2));
        assert!(
            fetch(&w, aliased("mine")).await.unwrap_err().message.contains("exists"),
            "names another one"
        );
        assert_eq!(w.faults().await, Vec::<String>::new());
        w.engine.close();
    });
}

#[test]
fn a_download_that_ends_badly_leaves_nothing_and_says_why() {
    SeededEnv::run(2, |env| async move {
        let (w, server) = world(&env).await;
        let before = w.fingerprint();
        let usual = server.0.lock().unwrap().clone();
        for (change, words) in [
            (Behaviour { broken: true, ..usual.clone() }, "broke off"),
            (Behaviour { lie: Some("something else".into()), ..usual.clone() }, "fingerprint"),
            (Behaviour { lie: Some("not an image".into()), ..usual.clone() }, "not of an image"),
        ] {
            *server.0.lock().unwrap() = change;
            let e = fetch(&w, aliased("mine")).await.unwrap_err();
            assert!(e.message.contains(words), "{e}");
            let e = launch(&w, "c1").await.unwrap_err();
            assert!(e.message.contains(words), "{e}");
            w.settle().await;
            assert_eq!((w.faults().await, w.fingerprint()), (vec![], before.clone()), "{words}");
        }
        for wrong in ["http://images.example", "https://", "ftp://x", "https://a b", "https://u@x", ""] {
            let mut request = aliased("mine");
            request.source.from.server = wrong.into();
            let e = fetch(&w, request).await.unwrap_err();
            assert_eq!(e.field.as_deref(), Some("source.server"), "{wrong} {e}");
        }
        let mut request = aliased("mine");
        request.source.reference = String::new();
        assert_eq!(fetch(&w, request).await.unwrap_err().field.as_deref(), Some("source.alias"));
        let mut request = aliased("mine");
        request.source.reference = "nope".into();
        assert!(fetch(&w, request).await.unwrap_err().message.contains("no such image"));
        assert_eq!(w.fingerprint(), before);
        w.engine.close();
    });
}

#[test]
fn images_follow_their_server_and_go_when_nobody_uses_them() {
    SeededEnv::run(3, |env| async move {
        let (w, server) = world(&env).await;
        fetch(&w, aliased("mine")).await.unwrap();
        let first = w.engine.image(&w.admin, "default", "mine").unwrap();
        let refresh = w.engine.image_refresh(&w.admin, "default", "mine").await.unwrap();
        assert_eq!(w.ended(refresh).await.metadata["refreshed"], false);
        server.0.lock().unwrap().content = "the second".into();
        let refresh = w.engine.image_refresh(&w.admin, "default", "mine").await.unwrap();
        assert_eq!(w.ended(refresh).await.metadata["refreshed"], true);
        let second = w.engine.image(&w.admin, "default", "mine").unwrap();
        assert_ne!(first.fingerprint, second.fingerprint);
        assert_eq!(fingerprints(&w), std::slice::from_ref(&second.fingerprint), "the older one went");

        // By the clock.
        server.0.lock().unwrap().content = "the third".into();
        env.sleep(Duration::from_secs(5 * 3600)).await;
        assert_eq!(fingerprints(&w), std::slice::from_ref(&second.fingerprint), "not yet");
        env.sleep(Duration::from_secs(2 * 3600)).await;
        let third = w.engine.image(&w.admin, "default", "mine").unwrap();
        assert_ne!(second.fingerprint, third.fingerprint);

        // A server that is away changes nothing.
        server.0.lock().unwrap().content = "the fourth".into();
        server.0.lock().unwrap().broken = true;
        env.sleep(Duration::from_secs(8 * 3600)).await;
        assert_eq!(fingerprints(&w), std::slice::from_ref(&third.fingerprint));
        server.0.lock().unwrap().broken = false;

        // What was only cached goes after a day that nobody used it, what was copied stays.
        server.0.lock().unwrap().content = "of an instance".into();
        launch(&w, "c1").await.unwrap();
        let config = [("images.remote_cache_expiry", "1"), ("images.auto_update_interval", "0")];
        let config: Config = config.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        w.engine.server_config_update(&w.admin, config, None).await.unwrap();
        env.sleep(Duration::from_secs(23 * 3600)).await;
        let cached = |w: &World| {
            let all = w.engine.images(&w.admin, "default").unwrap();
            all.iter().filter(|i| i.origin.as_ref().is_some_and(|o| o.cached)).count()
        };
        assert_eq!(cached(&w), 1);
        env.sleep(Duration::from_secs(2 * 3600)).await;
        assert_eq!(cached(&w), 0);
        assert!(w.engine.image(&w.admin, "default", "mine").is_ok());
        w.settle().await;
        assert_eq!(w.faults().await, Vec::<String>::new());
        w.engine.close();
    });
}

#[test]
fn images_are_followed_by_a_daemon_that_starts_often_and_not_at_each_start() {
    SeededEnv::run(4, |env| async move {
        let (mut w, server) = world(&env).await;
        fetch(&w, aliased("mine")).await.unwrap();
        let fingerprint =
            |w: &World| w.engine.image(&w.admin, "default", "mine").unwrap().fingerprint.clone();
        let first = fingerprint(&w);
        server.0.lock().unwrap().content = "the second".into();
        // Each life is shorter than the six hours, and none of them is long enough by itself.
        for _ in 0..2 {
            env.sleep(Duration::from_secs(2 * 3600)).await;
            w.reopen().await.unwrap();
            w.engine.set_image_servers(server.clone());
            assert_eq!(fingerprint(&w), first, "not yet");
        }
        env.sleep(Duration::from_secs(3 * 3600)).await;
        let second = fingerprint(&w);
        assert_ne!(first, second);

        // That the server is away counts as a look: it is not asked again each minute, nor at each start.
        server.0.lock().unwrap().content = "the third".into();
        server.0.lock().unwrap().broken = true;
        env.sleep(Duration::from_secs(6 * 3600)).await;
        let asked = server.0.lock().unwrap().fetched;
        for _ in 0..3 {
            env.sleep(Duration::from_secs(1200)).await;
            w.reopen().await.unwrap();
            w.engine.set_image_servers(server.clone());
        }
        assert_eq!((server.0.lock().unwrap().fetched, fingerprint(&w)), (asked, second.clone()));
        assert_eq!(asked, 3, "of the third it heard once");
        server.0.lock().unwrap().broken = false;
        env.sleep(Duration::from_secs(6 * 3600)).await;
        assert_ne!(fingerprint(&w), second);
        w.settle().await;
        assert_eq!(w.faults().await, Vec::<String>::new());
        w.engine.close();
    });
}

/// What a project says of its images goes over what the server says, for that project alone.
#[test]
fn a_project_keeps_and_follows_its_images_as_it_says() {
    SeededEnv::run(4, |env| async move {
        let (w, server) = world(&env).await;
        let of = |pairs: &[(&str, &str)]| -> Config {
            pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
        };
        let keys = [("images.auto_update_interval", "0"), ("images.remote_cache_expiry", "1")];
        w.engine.project_create(&w.admin, "still", "", of(&keys)).await.unwrap();
        let keys = [("images.auto_update_interval", "2"), ("images.auto_update_cached", "false")];
        w.engine.project_create(&w.admin, "quick", "", of(&keys)).await.unwrap();
        let devices = w.engine.profile(&w.admin, "default", "default").unwrap().devices.clone();
        for project in ["default", "still", "quick"] {
            if project != "default" {
                let update =
                    karst_engine::tenancy::UpdateProfile { devices: devices.clone(), ..Default::default() };
                w.engine.profile_update(&w.admin, project, "default", update).await.unwrap();
            }
            let live = w.engine.image_fetch(&w.admin, project, aliased("mine")).await.unwrap();
            assert_eq!(w.ended(live).await.error, None);
        }
        let now = |project: &str| w.engine.image(&w.admin, project, "mine").unwrap().fingerprint.clone();
        let first = now("default");
        server.0.lock().unwrap().content = "the second".into();
        env.sleep(Duration::from_secs(3 * 3600)).await;
        assert_eq!((now("default"), now("still")), (first.clone(), first.clone()));
        assert_ne!(now("quick"), first, "every second hour");
        env.sleep(Duration::from_secs(4 * 3600)).await;
        assert_eq!(now("still"), first, "never");
        assert_ne!(now("default"), first, "as the server says");

        // Fetched for an instance: followed or not, and kept a day.
        server.0.lock().unwrap().content = "of an instance".into();
        for project in ["default", "still", "quick"] {
            let live = w.engine.instance_create_remote(&w.admin, project, container("c1"), source("tiny"));
            assert_eq!(w.ended(live.await.unwrap()).await.error, None);
        }
        let cached = |project: &str| {
            let all = w.engine.images(&w.admin, project).unwrap();
            let of = all.iter().filter_map(|i| i.origin.clone()).filter(|o| o.cached);
            of.map(|o| o.auto_update).collect::<Vec<_>>()
        };
        assert_eq!((cached("still"), cached("quick")), (vec![true], vec![false]));
        env.sleep(Duration::from_secs(23 * 3600)).await;
        assert_eq!(cached("still").len(), 1);
        env.sleep(Duration::from_secs(2 * 3600)).await;
        assert_eq!(cached("still").len(), 0);
        w.settle().await;
        assert_eq!(w.faults().await, Vec::<String>::new());
        w.engine.close();
    });
}

#[test]
fn an_image_whose_time_is_over_stays() {
    SeededEnv::run(5, |env| async move {
        let (w, _server) = world(&env).await;
        let mut request = aliased("mine");
        request.options.expires_at = Some(env.now() + Duration::from_secs(3600));
        fetch(&w, request).await.unwrap();
        let shown = |w: &World| w.engine.image(&w.admin, "default", "mine").unwrap().expires_at;
        let at = shown(&w);
        assert!(at.is_some());
        env.sleep(Duration::from_secs(25 * 3600)).await;
        assert_eq!(shown(&w), at, "as with Incus, it is told and nothing follows of it");
        w.engine.close();
    });
}

#[test]
fn a_secret_is_good_once_and_for_a_while() {
    SeededEnv::run(1, |env| async move {
        let (w, server) = world(&env).await;
        fetch(&w, aliased("mine")).await.unwrap();
        let push = |secret: &str| PushImage {
            server: "https://images.example".into(),
            secret: secret.into(),
            ..Default::default()
        };
        let pushed = async |secret: &str| -> Result<()> {
            let live = w.engine.image_push(&w.admin, "default", "mine", push(secret)).await?;
            w.ended(live).await.error.clone().map_or(Ok(()), Err)
        };
        server.0.lock().unwrap().awaits = "open".into();
        assert!(pushed("closed").await.unwrap_err().message.contains("awaits"));
        assert!(pushed("").await.unwrap_err().message.contains("secret is missing"));
        pushed("open").await.unwrap();
        let (fingerprint, content) = server.0.lock().unwrap().brought.clone().unwrap();
        assert_eq!(fingerprints(&w), std::slice::from_ref(&fingerprint));
        assert!(!content.is_empty());

        // The other side of it.
        let awaited = "ab".repeat(32);
        let options = ImageOptions { public: true, ..Default::default() };
        let make = || {
            let (live, secret) =
                w.engine.image_await(&w.admin, "default", &awaited, options.clone()).unwrap();
            let record = format!("{:?}", live.snapshot());
            assert!(record.contains(&awaited) && !record.contains(&secret), "others see {record}");
            secret
        };
        let here = w.engine.image_await(&w.admin, "default", &fingerprint, options.clone());
        assert!(here.unwrap_err().message.contains("exists already"));
        let secret = make();
        assert!(w.engine.image_admit("other", &awaited, &secret).is_err(), "of another project");
        assert!(w.engine.image_admit("default", &fingerprint, &secret).is_err(), "of another image");
        assert!(w.engine.image_admit("default", &awaited, "").is_err());
        let admitted = w.engine.image_admit("default", &awaited.to_uppercase(), &secret).unwrap();
        assert!(admitted.options.public && admitted.context.demand_known().is_ok());
        assert!(w.engine.image_admit("default", &awaited, &secret).is_err(), "it is used");
        let late = make();
        env.sleep(Duration::from_secs(1000)).await;
        assert!(w.engine.image_admit("default", &awaited, &late).is_err(), "its time is over");
        // One project does not take the places of all.
        let all: Vec<String> = (0..64).map(|_| make()).collect();
        let more = |project: &str| w.engine.image_await(&w.admin, project, &awaited, options.clone());
        assert_eq!(more("default").unwrap_err().kind, karst_model::ErrorKind::Quota);
        let own = Config::from([("features.images".to_owned(), "true".to_owned())]);
        w.engine.project_create(&w.admin, "other", "", own).await.unwrap();
        more("other").unwrap();
        w.engine.image_admit("default", &awaited, &all[0]).unwrap();
        more("default").expect("a place is free again");
    });
}
