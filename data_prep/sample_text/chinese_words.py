"""Word lists and templates of the Chinese generator (data only; the notation is that of grammar.py)."""

_words = str.split

SURNAMES = list("王李张刘陈杨黄赵吴周徐孙马朱胡林郭何高罗")
GIVEN_NAMES = _words(
    """
    伟 芳 娜 敏 静 丽 强 磊 军 洋 勇 艳 杰 涛 明 超 秀兰 建国
    志强 小红 文华 海燕 国庆 春梅 晓东 雪 玉兰 思远 子涵 佳怡
    """
)
CITIES = _words(
    "北京 上海 广州 成都 杭州 西安 南京 武汉 重庆 天津 苏州 青岛 长沙 大连 昆明 厦门 济南 沈阳 郑州 合肥"
)
PROVINCES = _words("四川 云南 浙江 江苏 山东 河南 湖北 湖南 广东 福建 陕西 河北 安徽 江西 辽宁 甘肃")
RIVERS = _words("长江 黄河 清江 白河 松江 金沙江 沅水 汉水 湘江 赣江 闽江 珠江")
JOBS = _words("老师 医生 工程师 农民 记者 作家 画家 司机 厨师 科学家 律师 学生 演员 音乐家 护士 商人")
SUBJECTS = _words("数学 物理 化学 历史 文学 音乐 医学 经济 法律 地理 生物 哲学")
INDUSTRIES = _words("茶叶 丝绸 钢铁 旅游 汽车 水果 陶瓷 渔业 纺织 电子 煤炭 木材")
PLACES = _words("学校 公园 医院 图书馆 市场 车站 博物馆 工厂 村子 河边 山上 饭店 广场 花园")
THINGS = _words("书 信 灯 钟 画 椅子 茶杯 雨伞 自行车 照片 手机 电脑 箱子 帽子 钥匙 毛衣")
FOODS = _words("米饭 面条 饺子 苹果 豆腐 鱼 白菜 鸡蛋 西瓜 茶 牛肉 包子 葡萄 橘子")
ANIMALS = _words("猫 狗 马 鸟 兔子 鱼 羊 老虎 大象 猴子 熊猫 乌龟")
FEELINGS = _words("高兴 难过 生气 担心 满意 惊讶 骄傲 紧张 轻松 孤单")
QUALITIES = _words("美丽 古老 安静 热闹 重要 著名 干净 神秘 宽阔 普通 温暖 明亮")
VERBS = _words("修好 找到 买下 打开 送走 带来 忘记 画完 洗净 收好 卖掉 看见")
COLOURS = _words("红色 绿色 白色 黑色 黄色 蓝色 灰色 紫色")
SEASONS = _words("春天 夏天 秋天 冬天")
WEEKDAYS = list("一二三四五六日")
DIGITS = list("三五两四六八十七九")

RULES = {
    "news_detail": [
        "有关部门表示，{work}预计需要{digit}个月。",
        "{name}说：“我们对这个结果感到{feeling}。”",
        "据{job}介绍，这里的{place}已经有{digit}十年的历史。",
        "{surname}先生认为，{industry}的发展离不开{subject}。",
        "{明天|后天|本周末|下周}当地可能{下雨|下雪|刮大风|降温}，请市民注意{安全|保暖|交通}。",
        "{活动|会议|展览}将持续到{season}，门票可以在{place}领取。",
        "许多{job}和{job}参加了这次{活动|会议|讨论}。",
        "目前没有人员受伤，原因正在调查。",
        "与去年相比，{industry}的价格{上涨|下降}了{percent}%。",
        "专家提醒，{food}虽然好吃，但不能吃得太多。",
    ],
    "work": ["修复工作", "整个工程", "改造", "调查"],
    "town_detail": [
        "这里的{industry}和{industry}十分有名。",
        "每年{season}，人们都会在{place}举行{比赛|庙会|音乐会|展览}。",
        "一条铁路把它与{city}连接起来。",
        "当地的{food}远近闻名，吸引了许多{城里人|游客|{job}}。",
        "{古老|著名}的{place}建于{dynasty}，后来多次重修。",
        "{job}{name}就出生在这里。",
        "这里{season}{quality}，{season}{多雨|少雨|多风}。",
        "河里有{colour}的{animal}，山上有{quality}的{place}。",
    ],
    "dynasty": ["唐代", "宋代", "明代", "清代", "元代"],
    "life_detail": [
        "{年轻|小|上学}的时候，{he}最喜欢{subject}。",
        "后来{he}到{city}工作，认识了{job}{name}。",
        "{he}写了{digit}本关于{subject}的书。",
        "人们说{he}是一个{quality}的人。",
        "{he}的{哥哥|姐姐|弟弟|妹妹}也是{job}。",
        "{he}曾经去过{province}和{province}。",
        "{city}的{place}里还保存着{he}的{thing}。",
        "{he}拒绝了{city}的邀请，一直住在{province}。",
    ],
    "story_opening": [
        "从前，{province}有一个{quality}的村子，村里住着一位叫{hero}的{job}。",
        "{season}的一个{早上|晚上|下午}，{hero}来到{place}。",
        "{hero}有一{只|条}{quality}的{animal}，{he}们每天都在一起。",
        "星期{weekday}，{hero}和{friend}约好在{place}见面。",
        "谁也不知道{hero}是从哪里来的。",
    ],
    "story_middle": [
        "{hero}想{找到|买下|修好}那{个|件}{colour}的{thing}。",
        "突然，{place}里传来{奇怪|很大|轻轻}的声音。",
        "{friend}问：“你为什么这么{feeling}？”",
        "“{remark}”{hero}{笑着|小声|认真}地说。",
        "{he}{verb}了{thing}，然后{回家了|坐了下来|继续往前走|什么也没说}。",
        "走了{digit}个小时以后，他们到了{place}。",
        "{friend}很{feeling}，{hero}却觉得很{feeling}。",
        "那{只|条}{animal}看了看{hero}，{跑开了|叫了一声|慢慢走过来}。",
        "他们一起吃了{food}和{food}。",
        "可是{thing}{不见了|坏了|太旧了|被雨淋湿了}。",
        "{he}{first}去了{place}，又去了{place}，都没有{找到|看见}{thing}。",
    ],
    "first": ["先", "首先", "一个人"],
    "remark": [
        "我不知道。",
        "明天再试一次吧。",
        "它在{place}里。",
        "你看见我的{animal}了吗？",
        "我们回家吧。",
        "这是{friend}的{thing}。",
        "{digit}年以前，我也来过这里。",
    ],
    "story_ending": [
        "最后，{hero}在{place}{找到了|看见了}{thing}，心里很{feeling}。",
        "从那以后，{hero}和{friend}成了最好的朋友。",
        "{hero}把{thing}送给了{friend}。",
        "直到{season}，那{只|条}{animal}才回来。",
        "这个故事一直在{city}流传。",
    ],
}
